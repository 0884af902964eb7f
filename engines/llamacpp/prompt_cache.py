"""Prompts that have left their slot: what was computed for them, in host memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engines.llamacpp.prefix_tree import TOKEN_BYTES, PrefixTree, key_of

State = npt.NDArray[np.uint8]
"""What llama.cpp writes of one sequence."""


@dataclass(frozen=True, eq=False)
class Entry:
    """One prompt, perhaps with the output that followed.

    Attributes:
        n_tokens: How many tokens it holds.
        state: What was computed for them.
    """

    n_tokens: int
    state: State

    @property
    def n_bytes(self) -> int:
        """What it takes in memory."""
        return self.n_tokens * TOKEN_BYTES + self.state.nbytes


class PromptCache:
    """Entries within a bound; the least recently used goes first, and a prefix that others extend after those.

    Args:
        limit_bytes: Of all entries; 0 keeps none.
        tree: Finds them by their tokens.
        spare: Tokens at the end of an entry that, at least, are worth keeping it beside one that has the others.
    """

    def __init__(self, limit_bytes: int, tree: PrefixTree[Entry], *, spare: int) -> None:
        self._limit_bytes = limit_bytes
        self._tree = tree
        self._spare = 1 if tree.whole_only else spare
        self._entries: OrderedDict[Entry, None] = OrderedDict()  # least recently used first
        self.n_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def limit_bytes(self) -> int:
        """Most bytes that it takes."""
        return self._limit_bytes

    def touch(self, entry: Entry) -> None:
        """It was of use."""
        if entry in self._entries:
            self._entries.move_to_end(entry)

    def takes(self, n_bytes: int) -> bool:
        """Whether an entry of this size can be added at all."""
        return n_bytes <= self._limit_bytes

    def add(self, tokens: Seq[int], state: State) -> None:
        """Keep a state; makes room for it first. One that is too large is not kept.

        What has hardly a token that it has not is dropped, if it can be cut back: the turn before of a conversation,
        whose answer came back a little changed, would take as much memory again and save hardly a step.
        """
        entry, key = Entry(len(tokens), state), key_of(tokens)
        if not self.takes(entry.n_bytes):
            return
        for other in self._tree.nearly(key, self._spare * TOKEN_BYTES):
            if not self._tree.whole_only or other.n_tokens == entry.n_tokens:
                self.drop(other)  # cut back, the new one is the same
        self._shrink(self._limit_bytes - entry.n_bytes)
        self._tree.add(entry, key)
        self._entries[entry] = None
        self.n_bytes += entry.n_bytes

    def drop(self, entry: Entry) -> None:
        """Forget one."""
        if entry in self._entries:
            del self._entries[entry]
            self._tree.remove(entry)
            self.n_bytes -= entry.n_bytes

    def drop_beginnings(self, tokens: Seq[int]) -> None:
        """Forget all that these tokens begin with."""
        for entry in self._tree.beginnings(key_of(tokens)):
            self.drop(entry)

    def halve(self) -> None:
        """Take half of what is held from now on, if there is something: the system has no more."""
        if self.n_bytes:
            self._limit_bytes = self.n_bytes // 2
            self._shrink(self._limit_bytes)

    def clear(self) -> None:
        """Forget all entries."""
        self._shrink(0)

    def _shrink(self, limit_bytes: int) -> None:
        while self.n_bytes > limit_bytes:
            leaves = (entry for entry in self._entries if not self._tree.is_extended(entry))
            self.drop(next(leaves))
