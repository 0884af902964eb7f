"""Prompts that have left their slot: what was computed for them, in host memory.

The entries are kept in the order of their tokens' bytes. So the entry that shares most with a prompt stands next to
where the prompt would stand: with entries for ``A B C``, ``A B D E`` and ``F``, the prompt ``A B D G`` would stand
after ``A B D E``, which shares three tokens with it.
"""

from __future__ import annotations

import bisect
from array import array
from collections import OrderedDict
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engines.llamacpp.slots import common_prefix

State = npt.NDArray[np.uint8]
"""What llama.cpp writes of one sequence."""

_TOKEN_BYTES = array("i").itemsize


@dataclass(frozen=True)
class Entry:
    """One prompt, perhaps with the output that followed.

    Attributes:
        key: Its tokens.
        state: What was computed for them.
    """

    key: bytes
    state: State

    @property
    def n_bytes(self) -> int:
        """What it takes in memory."""
        return len(self.key) + self.state.nbytes

    @property
    def n_tokens(self) -> int:
        """How many tokens it holds."""
        return len(self.key) // _TOKEN_BYTES


class PromptCache:
    """Entries within a bound; the least recently used goes first, and a prefix that others extend after those.

    Args:
        limit_bytes: Of all entries; 0 keeps none.
        whole_only: Whether a state cannot be cut, so that an entry serves only prompts that begin with all of it.
    """

    def __init__(self, limit_bytes: int, *, whole_only: bool) -> None:
        self._limit_bytes = limit_bytes
        self._whole_only = whole_only
        self._order: list[bytes] = []  # keys, sorted
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()  # least recently used first
        self.n_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def limit_bytes(self) -> int:
        """Most bytes that it takes."""
        return self._limit_bytes

    def find(self, prompt: Seq[int], *, at_most: int) -> tuple[Entry, int] | None:
        """The entry that shares the longest prefix with a prompt, and how many tokens that are.

        Args:
            prompt: Its tokens.
            at_most: Tokens of the prompt that are of use.
        """
        key = _key(prompt[:at_most])
        entry = self._longest_beginning(key) if self._whole_only else self._nearest(key)
        if entry is None:
            return None
        shared = common_prefix(key, entry.key) // _TOKEN_BYTES
        return (entry, shared) if shared else None

    def touch(self, entry: Entry) -> None:
        """It was of use."""
        if entry.key in self._entries:
            self._entries.move_to_end(entry.key)

    def knows(self, tokens: Seq[int]) -> bool:
        """Whether an entry would serve as well as one for these tokens; it counts as used then."""
        key = _key(tokens)
        at = bisect.bisect_left(self._order, key)
        known = at < len(self._order) and (
            self._order[at] == key or (not self._whole_only and self._order[at].startswith(key))
        )
        if known:
            self._entries.move_to_end(self._order[at])
        return known

    def takes(self, n_bytes: int) -> bool:
        """Whether an entry of this size can be added at all."""
        return n_bytes <= self._limit_bytes

    def add(self, tokens: Seq[int], state: State) -> None:
        """Keep a state; makes room for it first. One that is too large is not kept."""
        entry = Entry(_key(tokens), state)
        self._drop(entry.key)
        if not self.takes(entry.n_bytes):
            return
        if not self._whole_only:
            while (shorter := self._longest_beginning(entry.key)) is not None:
                self._drop(shorter.key)  # cut back, the new one is the same
        self._shrink(self._limit_bytes - entry.n_bytes)
        bisect.insort(self._order, entry.key)
        self._entries[entry.key] = entry
        self.n_bytes += entry.n_bytes

    def halve(self) -> None:
        """Take half of what is held from now on: the system has no more."""
        self._limit_bytes = self.n_bytes // 2
        self._shrink(self._limit_bytes)

    def clear(self) -> None:
        """Forget all entries."""
        self._order.clear()
        self._entries.clear()
        self.n_bytes = 0

    def drop(self, entry: Entry) -> None:
        """Forget one, which did not work."""
        self._drop(entry.key)

    def _nearest(self, key: bytes) -> Entry | None:
        at = bisect.bisect_left(self._order, key)
        beside = self._order[max(0, at - 1) : at + 1]
        best = max(beside, key=lambda other: common_prefix(key, other), default=None)
        return None if best is None else self._entries[best]

    def _longest_beginning(self, key: bytes) -> Entry | None:
        """The longest entry that the key begins with.

        If the key's neighbour is not it, both share only part of the neighbour, and it is no longer than that part.
        """
        while at := bisect.bisect_right(self._order, key):
            neighbour = self._order[at - 1]
            shared = common_prefix(key, neighbour)
            if shared == len(neighbour):
                return self._entries[neighbour]
            key = key[: shared - shared % _TOKEN_BYTES]
        return None

    def _shrink(self, limit_bytes: int) -> None:
        while self.n_bytes > limit_bytes:
            self._drop(next((key for key in self._entries if not self._extended(key)), next(iter(self._entries))))

    def _extended(self, key: bytes) -> bool:
        after = bisect.bisect_right(self._order, key)
        return after < len(self._order) and self._order[after].startswith(key)

    def _drop(self, key: bytes) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.n_bytes -= entry.n_bytes
            del self._order[bisect.bisect_left(self._order, key)]


def _key(tokens: Seq[int]) -> bytes:
    return array("i", tokens).tobytes()
