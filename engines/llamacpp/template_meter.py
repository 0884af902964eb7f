"""What one rendering of a chat template may take: processor time, and memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator

from engines.errors import InvalidPrompt

MAX_BYTES = 256 * 2**20
"""Of everything that a rendering makes, whether it lets go of it or not: what it keeps cannot be told apart."""

_ITEM_BYTES = 64
_OBJECT_BYTES = 400  # a namespace, a generator: what cannot be asked for its size


class Meter:
    """Counts for one rendering, from now on, on this thread.

    Args:
        limit_s: Processor time that it may take.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._end_s = time.thread_time() + limit_s
        self._left_bytes = MAX_BYTES

    def check(self) -> None:
        """Raise `InvalidPrompt` once the time is over."""
        if time.thread_time() > self._end_s:
            raise InvalidPrompt(f"the model's chat template took longer than {self._limit_s:g} s; send prompt instead")

    def count(self, size: int) -> None:
        """Raise `InvalidPrompt` once more than `MAX_BYTES` were counted."""
        self._left_bytes -= size
        if self._left_bytes < 0:
            raise InvalidPrompt(
                f"the model's chat template takes more than {MAX_BYTES // 2**20} MiB of memory; send prompt instead"
            )

    def made(self, value: object) -> None:
        """Count an object that was made, without what is inside of it."""
        if isinstance(value, (str, int, float, list, tuple, dict)):
            self.count(sys.getsizeof(value))
        elif value is not None:
            self.count(_OBJECT_BYTES)

    def items(self, items: Iterable[object]) -> Iterator[object]:
        """The same items, counted, with a look at the time before each."""
        for item in items:
            self.check()
            self.count(_ITEM_BYTES)
            yield item
