"""Slots: what each one's KV cache holds, and which one a new prompt should get."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from engines.api import Sequence
from engines.llamacpp.sampling import Sampler
from engines.llamacpp.text import OutputText

MIN_COPY = 32
"""Tokens a copy must save over reusing a slot's own cache; a copy moves whole buffers, a few tokens prefill faster."""


@dataclass
class Run:
    """A sequence in its slot.

    Attributes:
        sequence: What is being continued.
        order: Admission order, lower is older.
        text: Output as it may be shown.
        sampler: None where the highest logit decides.
        next_token: Sampled but not yet fed to the model; None while the prompt is being prefilled.
        tokens_out: Output tokens so far.
        leader: A run that is prefilling a prefix of this prompt; until it has, this one waits instead of doing it too.
        shared: Length of that prefix.
    """

    sequence: Sequence
    order: int
    text: OutputText
    sampler: Sampler | None
    next_token: int | None = None
    tokens_out: int = 0
    leader: Run | None = None
    shared: int = 0

    @property
    def decoding(self) -> bool:
        """Whether its prompt is done."""
        return self.next_token is not None


@dataclass
class Slot:
    """One KV stream of a context.

    Attributes:
        index: llama.cpp's sequence id.
        cached: The tokens whose keys and values the stream holds, by position.
        run: The sequence it works on.
        used: When it was last given away, in admissions; lower is longer ago.
    """

    index: int
    cached: list[int] = field(default_factory=list)
    run: Run | None = None
    used: int = 0


@dataclass(frozen=True)
class Reuse:
    """Where a prompt goes, and what it need not compute again.

    Attributes:
        slot: Index of the free slot to take.
        keep: Leading prompt tokens that are cached.
        copy_from: Slot to copy them from; None where the slot holds them itself.
    """

    slot: int
    keep: int
    copy_from: int | None = None


def common_prefix(a: Seq[int], b: Seq[int]) -> int:
    """Length of the longest common prefix; slices are compared at C speed, halving the unknown part each time."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def find_reuse(prompt: list[int], slots: Seq[Slot], *, may_copy: bool) -> Reuse:
    """The free slot that costs the least.

    The last prompt token is always computed, because its logits are needed. A slot that would lose more cached tokens
    than the prompt takes over from it is left alone if another slot's prefix can be copied into an older one instead.
    """
    limit = len(prompt) - 1
    shared = {slot.index: min(common_prefix(prompt, slot.cached), limit) for slot in slots}
    free = [slot for slot in slots if slot.run is None]
    own = max(free, key=lambda slot: (shared[slot.index], -slot.used))
    keep = shared[own.index]
    if keep and keep * 2 >= len(own.cached):
        in_place = Reuse(own.index, keep)
    else:
        fresh = _choose_fresh(free, slots)
        in_place = Reuse(fresh.index, shared[fresh.index])
    if may_copy:
        donor = max(slots, key=lambda slot: shared[slot.index])
        if donor.index != in_place.slot and shared[donor.index] >= in_place.keep + MIN_COPY:
            return Reuse(in_place.slot, shared[donor.index], copy_from=donor.index)
    elif keep > in_place.keep:
        return Reuse(own.index, keep)
    return in_place


def _choose_fresh(free: Seq[Slot], slots: Seq[Slot]) -> Slot:
    """A slot whose cache is given up: of the older half of the free ones, one beside those that work (see `batch`)."""
    oldest = sorted(free, key=lambda slot: (len(slot.cached) > 0, slot.used))[: (len(free) + 1) // 2]
    working = [slot.index for slot in slots if slot.run is not None]

    def away(slot: Slot) -> tuple[int, int]:
        distances = sorted(abs(slot.index - other) for other in working)
        return distances[0] if distances else 0, -sum(distance == 1 for distance in distances)

    return min(oldest, key=away)


def find_donor(prompt: list[int], own: Slot, slots: Seq[Slot]) -> Reuse | None:
    """What a copy from another slot would save a slot that works on this prompt; None if that is not worth it."""
    limit = len(prompt) - 1
    shared = {slot.index: min(common_prefix(prompt, slot.cached), limit) for slot in slots if slot is not own}
    donor = max(shared, key=shared.__getitem__, default=None)
    if donor is None or shared[donor] < len(own.cached) + MIN_COPY:
        return None
    return Reuse(own.index, shared[donor], copy_from=donor)


def find_leader(prompt: list[int], keep: int, slots: Seq[Slot], *, urgent: bool) -> tuple[Run, int] | None:
    """A run that will prefill more of this prompt than ``keep`` tokens before this one's turn comes.

    Returns:
        The run and the length of the common prefix; None if waiting for it would not pay.
    """
    limit = len(prompt) - 1
    best: tuple[Run, int] | None = None
    for slot in slots:
        run = slot.run
        if run is None or run.decoding or run.leader is not None or run.sequence.urgent < urgent:
            continue
        shared = min(common_prefix(prompt, list(run.sequence.tokens)), limit)
        if shared >= max(keep + MIN_COPY, len(slot.cached) + 1, best[1] + 1 if best else 0):
            best = run, shared
    return best
