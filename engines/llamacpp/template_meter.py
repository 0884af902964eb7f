"""The processor time and memory that one rendering of a chat template may take."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator

from engines.errors import InvalidPrompt

MAX_BYTES = 256 * 2**20
"""Of everything that a rendering makes, whether it lets go of it or not: what it keeps cannot be told apart."""

_LOOK_EVERY_S = 0.002  # a look at the thread's own time takes four times as long as one at the clock
_LARGE_BYTES = 64 * 1024
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
        self._next_look_s = 0.0
        self._left_bytes = MAX_BYTES

    def check(self) -> None:
        """Raise `InvalidPrompt` once the time is over."""
        now_s = time.perf_counter()
        if now_s < self._next_look_s:
            return
        self._next_look_s = now_s + _LOOK_EVERY_S
        if time.thread_time() > self._end_s:
            raise InvalidPrompt(f"the model's chat template took longer than {self._limit_s:g} s; send prompt instead")

    def count(self, size: int) -> None:
        """Raise `InvalidPrompt` once more than `MAX_BYTES` were counted."""
        self._left_bytes -= size
        if self._left_bytes < 0:
            raise InvalidPrompt(
                f"the model's chat template takes more than {MAX_BYTES // 2**20} MiB of memory; send prompt instead"
            )

    def made(self, value: object, *, inside: bool = False) -> None:
        """Count an object that was made, and what it consists of where that was made too."""
        if isinstance(value, (str, int, float, list, tuple, dict)):
            self.count(size := sys.getsizeof(value))
            if size > _LARGE_BYTES:
                self.check()
            if inside and not isinstance(value, (str, int, float)):
                self.count(_ITEM_BYTES * len(value))
        elif value is not None:
            self.count(_OBJECT_BYTES)

    def made_from(self, parts: list[str], text: str) -> None:
        """Count a text that takes the place of the first of its parts, which goes unless somebody else holds it.

        Many templates write all of a conversation into one variable. So the memory that they take is that of the
        conversation, and not of all that the variable ever was.
        """
        self.count(sys.getsizeof(text))
        if _holders(parts) <= _ONE_HOLDER:
            self.count(-sys.getsizeof(parts[0]))

    def holds(self, count: int) -> None:
        """Count references to this many objects."""
        self.count(_ITEM_BYTES * count)

    def items(self, items: Iterable[object]) -> Iterator[object]:
        """The same items, counted, with a look at the time before each."""
        for item in items:
            self.check()
            self.count(_ITEM_BYTES)
            yield item


def _holders(parts: list[str]) -> int:
    return sys.getrefcount(parts[0])


def _holders_of_an_attribute() -> int:
    attributes = {"text": "".join(("made", "here"))}
    return _holders([attributes["text"]])


_ONE_HOLDER = _holders_of_an_attribute()
