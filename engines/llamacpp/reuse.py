"""Which slot a prompt gets, and from where the beginning that is known: functions of plain values."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from engines.llamacpp.prefix_index import Known
from engines.llamacpp.slots import MIN_COPY, Run, Slot

Worth = Callable[[int], int]
"""Prompt tokens that a copy of a slot which holds so many must save to pay."""


@dataclass(frozen=True)
class Reuse:
    """Where a prompt goes, and what it need not compute again.

    Attributes:
        slot: Index of the free slot to take.
        keep: Leading prompt tokens that are cached.
        copy_from: Slot to copy them from; None where the slot holds them itself.
        restored: Whether they are restored from host memory.
    """

    slot: int
    keep: int
    copy_from: int | None = None
    restored: bool = False


def find_reuse(known: Known, slots: Seq[Slot], *, worth: Worth) -> Reuse:
    """The free slot that costs the least, now and later.

    A prompt that departs from what a slot holds is often not the next turn of that conversation but another one that
    begins alike: the prefix is copied to another slot, unless that one would lose more.

    Args:
        known: Of the prompt.
        slots: All of them, one free at least.
        worth: What a copy must save.
    """
    held, saved = known.held, known.saved
    free = [slot for slot in slots if slot.run is None]
    own = max(free, key=lambda slot: (held[slot.index], -slot.used))
    target = _choose_target(own, held[own.index], free, slots, worth=worth(len(own.cached)))
    if saved >= max(held) + MIN_COPY:
        return Reuse(target.index if held[target.index] else _choose_fresh(free, slots).index, saved, restored=True)
    return find_donor(known, target, slots, worth=worth) or Reuse(target.index, held[target.index])


def _choose_target(own: Slot, keep: int, free: Seq[Slot], slots: Seq[Slot], *, worth: int) -> Slot:
    """The slot that shares the most, or one to copy to where going on in that one would cut off more.

    A token of the older cache counts half: it is the one that is less likely to be missed.
    """
    others = [slot for slot in free if slot is not own]
    cut = len(own.cached) - keep
    if not others or (keep and cut < worth):
        return own
    if keep < worth:
        return _choose_fresh(free, slots)
    fresh = _choose_fresh(others, slots)
    return fresh if 2 * cut > len(fresh.cached) else own


def _choose_fresh(free: Seq[Slot], slots: Seq[Slot]) -> Slot:
    """A slot whose cache is given up: an empty one, or of the older half; of these one beside those that work.

    See `batch` for why.
    """
    oldest = [slot for slot in free if not slot.cached]
    oldest = oldest or sorted(free, key=lambda slot: slot.used)[: (len(free) + 1) // 2]
    working = [slot.index for slot in slots if slot.run is not None]

    def away(slot: Slot) -> tuple[int, int, int]:
        distances = sorted(abs(slot.index - other) for other in working)
        return distances[0] if distances else 0, -sum(distance == 1 for distance in distances), slot.used

    return min(oldest, key=away)


def find_donor(known: Known, own: Slot, slots: Seq[Slot], *, worth: Worth) -> Reuse | None:
    """What a copy from another slot would save a prompt in this one; None if that is not worth it."""
    donor = max(slots, key=lambda slot: known.held[slot.index])
    shared = known.held[donor.index]
    if donor is own or shared < known.held[own.index] + worth(len(donor.cached)):
        return None
    return Reuse(own.index, shared, copy_from=donor.index)


def find_leader(known: Known, own: Slot, slots: Seq[Slot], *, urgent: bool) -> tuple[Run, int] | None:
    """A run that will prefill more of a prompt than its slot holds before this one's turn comes.

    Returns:
        The run and the length of the common prefix; None if waiting for it would not pay.
    """
    best: tuple[Run, int] | None = None
    for slot in slots:
        run, shared = slot.run, known.coming[slot.index]
        if run is None or run.decoding or run.leader is not None or run.sequence.urgent < urgent:
            continue
        if shared >= max(len(own.cached) + MIN_COPY, len(slot.cached) + 1, best[1] + 1 if best else 0):
            best = run, shared
    return best
