"""Where the longest known beginning of a prompt is: in a slot, in a run that computes it now, or in host memory."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple

from engines.llamacpp.prefix_tree import PrefixTree, common_prefix, key_of
from engines.llamacpp.prompt_cache import Entry
from engines.llamacpp.slots import Slot


class Known(NamedTuple):
    """What is known of a prompt.

    Attributes:
        held: By slot, leading tokens that it holds.
        coming: By slot whose run reads its prompt, leading tokens that it will hold at the end of that.
        entry: What is saved and shares most; None if nothing does.
        saved: Leading tokens of that entry.
    """

    held: list[int]
    coming: list[int]
    entry: Entry | None = None
    saved: int = 0


class PrefixIndex:
    """The slots of a context and the entries of its prompt cache, in one tree.

    A slot is in the tree with the prompt of its run. What the run writes after that is compared with the slot itself,
    so that a step has nothing to note here, and what is written may be taken back. Only a run may change a slot's list,
    and only behind its prompt; all else makes a new one.

    Args:
        slots: All of the context's.
        cuts: Whether a state can be cut back, so that it serves prompts that share only its beginning.
    """

    def __init__(self, slots: Seq[Slot], *, cuts: bool) -> None:
        self.cuts = cuts
        self.tree: PrefixTree[Entry] = PrefixTree(whole_only=not cuts)
        self._slots = slots
        self._placed: dict[int, tuple[list[int], int]] = {}  # by slot: its `cached` then, and the tokens in the tree

    def find(self, tokens: list[int]) -> Known:
        """Where these tokens, or most of the first of them, are known."""
        for slot in self._slots:
            if slot.index not in self._placed or self._placed[slot.index][0] is not slot.cached:
                self._place(slot)
        match = self.tree.match(key_of(tokens))
        coming = [self._go_on(slot, tokens, match.slots[slot.index]) for slot in self._slots]
        held = [min(shared, len(slot.cached)) for slot, shared in zip(self._slots, coming, strict=True)]
        return Known(held, coming, match.entry, match.shared)

    def _place(self, slot: Slot) -> None:
        tokens = slot.cached if slot.run is None else slot.run.sequence.tokens
        self.tree.place(slot.index, key_of(tokens))
        self._placed[slot.index] = slot.cached, len(tokens)

    def _go_on(self, slot: Slot, tokens: list[int], shared: int) -> int:
        """Compare with what a slot has written, if all of its prompt is shared."""
        placed = self._placed[slot.index][1]
        if shared < placed or len(slot.cached) <= placed:
            return shared
        return shared + common_prefix(slot.cached[placed:], tokens[placed : len(slot.cached)])
