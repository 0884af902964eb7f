"""Which running sequence moves where, so that the slots in use are neighbours: functions of plain values.

llama.cpp computes the rows of neighbouring slots in one pass, and each pass reads all weights: see `batch`. Slots are
assigned side by side, but sequences end, and a conversation returns to the slot that has its prefix cached. Copying one
slot's cache costs as much as several steps with one extra pass; the caller says how many (`Payback`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from engines.llamacpp.slots import MIN_COPY, Slot

WORTH_MOVING = 8
"""Output tokens that a sequence must have ahead of it, however little a copy costs."""

Payback = Callable[[int], int]
"""For a number of tokens in a slot: after how many steps with one pass less a copy of that slot has paid off."""


class Move(NamedTuple):
    """A sequence goes to another slot.

    Attributes:
        source: The slot it is in, empty afterwards.
        target: The free slot that it goes to.
        spare: The slot that takes over what the target held: the source, if the sequence has nothing cached yet, or the
            free one that was used longest ago, whose own cache is lost. None where the target's is not worth it.
    """

    source: int
    target: int
    spare: int | None = None


def find_move(slots: Sequence[Slot], *, payback: Payback) -> Move | None:
    """The next move that brings the working slots closer together; None if they are, or it would not pay.

    The sequence farthest from the largest group of neighbours goes next to that group, or into a hole of it. It must
    have twice as many tokens ahead of it as the copies take to pay: few write all that they may.
    """
    groups = list(_groups([slot.index for slot in slots if slot.run is not None]))
    if len(groups) < 2:
        return None
    home = max(groups, key=len)

    def away(index: int) -> int:
        return max(home.start - index, index - (home.stop - 1))

    source = slots[max(groups[0].start, groups[-1].stop - 1, key=away)]
    assert source.run is not None  # it is in a group
    left = source.run.sequence.max_tokens - source.run.tokens_out
    if left < WORTH_MOVING:
        return None
    free = [slot for slot in slots if slot.run is None]
    target = min(free, key=lambda slot: (away(slot.index), slot.used))
    spare = _find_spare(source, target, free)
    steps = payback(len(source.cached)) if source.cached else 0
    if spare is not None:
        steps += payback(len(target.cached))
    return Move(source.index, target.index, spare) if left >= 2 * steps else None


def carry_out(move: Move, slots: Sequence[Slot]) -> None:
    """Note a move in the slots; the owner of the caches copies them."""
    source, target = slots[move.source], slots[move.target]
    cached, used, run = source.cached, source.used, source.run
    source.cached, source.used, source.run = [], 0, None
    if move.spare is not None:
        slots[move.spare].cached, slots[move.spare].used = target.cached, target.used
    target.cached, target.used, target.run = cached, used, run


def _find_spare(source: Slot, target: Slot, free: Sequence[Slot]) -> int | None:
    if len(target.cached) < MIN_COPY:
        return None
    if not source.cached:
        return source.index
    oldest = min(free, key=lambda slot: (len(slot.cached) > 0, slot.used))
    return oldest.index if oldest is not target else None


def _groups(indices: Sequence[int]) -> Iterator[range]:
    """Runs of neighbours among ascending indices."""
    start = 0
    for end in range(1, len(indices) + 1):
        if end == len(indices) or indices[end] != indices[end - 1] + 1:
            yield range(indices[start], indices[end - 1] + 1)
            start = end
