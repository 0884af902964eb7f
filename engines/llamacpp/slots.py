"""Slots: what each one's KV cache holds, and which one a new prompt should get."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from engines.api import Sequence
from engines.llamacpp.channels import Phase
from engines.llamacpp.grammar import Follower
from engines.llamacpp.guesser import Guesser
from engines.llamacpp.sampling import Sampler
from engines.llamacpp.text import OutputText

MIN_COPY = 32
"""Tokens a copy must save, however little it costs: so many are computed in a step that is made anyway."""

Worth = Callable[[int], int]
"""Prompt tokens that a copy of a slot which holds so many must save to pay."""

Kept = Callable[["Slot", int], int]
"""How many tokens are left of a slot that is cut back to so many; 0 if its memory cannot be cut there."""


@dataclass
class Run:
    """A sequence in its slot.

    Attributes:
        sequence: What is being continued.
        order: Admission order, lower is older.
        text: Output as it may be shown.
        sampler: None where the highest logit decides.
        follower: None where any token may come next.
        guesser: None where nothing is guessed.
        guess: Tokens that may follow `next_token`, checked in the same step.
        next_token: Sampled but not yet fed to the model; None while the prompt is being prefilled.
        tokens_out: Output tokens so far.
        leader: A run that is prefilling a prefix of this prompt; until it has, this one waits instead of doing it too.
        shared: Length of that prefix.
        chunk: Rows of the last chunk of its prompt; 0 before the first.
        passed: Rows that other prompts got since.
        cached: Prompt tokens that were found in a cache.
    """

    sequence: Sequence
    order: int
    text: OutputText
    sampler: Sampler | None
    follower: Follower | None = None
    guesser: Guesser | None = None
    guess: Seq[int] = ()
    next_token: int | None = None
    tokens_out: int = 0
    leader: Run | None = None
    shared: int = 0
    chunk: int = 0
    passed: int = 0
    cached: int = 0

    @property
    def answering(self) -> bool:
        """Whether its next token can be part of the answer; a schema says nothing about reasoning."""
        return self.text.phase is not Phase.REASONING

    @property
    def forced(self) -> Seq[int]:
        """The tokens that come next whatever the model makes of it."""
        return self.follower.forced() if self.follower is not None and self.answering else ()

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
        stored: Whether they are restored from host memory.
    """

    slot: int
    keep: int
    copy_from: int | None = None
    stored: bool = False


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


def find_reuse(prompt: list[int], slots: Seq[Slot], *, worth: Worth, kept: Kept, stored: int = 0) -> Reuse:
    """The free slot that costs the least, now and later.

    The last prompt token is always computed, because its logits are needed. A prompt that departs from what a slot
    holds is often not the next turn of that conversation but another one that begins alike: the prefix is copied to
    another slot, unless that one would lose more.

    Args:
        prompt: Its tokens.
        slots: All of them, one free at least.
        worth: What a copy must save.
        kept: What a slot can be cut back to.
        stored: Leading tokens that can be restored from host memory.
    """
    limit = len(prompt) - 1
    shared = {slot.index: kept(slot, min(common_prefix(prompt, slot.cached), limit)) for slot in slots}
    free = [slot for slot in slots if slot.run is None]
    own = max(free, key=lambda slot: (shared[slot.index], -slot.used))
    target = _choose_target(own, shared[own.index], free, slots, worth=worth(len(own.cached)))
    donor = max(slots, key=lambda slot: shared[slot.index])
    if stored >= max(shared[target.index], shared[donor.index]) + MIN_COPY:
        return Reuse(target.index if shared[target.index] else _choose_fresh(free, slots).index, stored, stored=True)
    if donor is not target and shared[donor.index] >= shared[target.index] + worth(len(donor.cached)):
        return Reuse(target.index, shared[donor.index], copy_from=donor.index)
    return Reuse(target.index, shared[target.index])


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


def find_donor(prompt: list[int], own: Slot, slots: Seq[Slot], *, worth: Worth, kept: Kept) -> Reuse | None:
    """What a copy from another slot would save a slot that works on this prompt; None if that is not worth it."""
    limit = len(prompt) - 1
    others = [slot for slot in slots if slot is not own]
    donor = max(others, key=lambda slot: common_prefix(prompt, slot.cached), default=None)
    if donor is None:
        return None
    shared = kept(donor, min(common_prefix(prompt, donor.cached), limit))
    if shared < len(own.cached) + worth(len(donor.cached)):
        return None
    return Reuse(own.index, shared, copy_from=donor.index)


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
