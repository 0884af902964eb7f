"""What leaves a slot is saved to host memory, and put back for a prompt that begins alike.

Both are copies that nothing else can run beside, and llama.cpp makes each in one piece. While somebody watches a
stream, a copy is made only if it and the step that follows stay within the step's target; what is too large for that is
not saved, or computed again.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from collections.abc import Sequence as Seq

from engines.llamacpp.native.context import NativeContext
from engines.llamacpp.prefix_index import PrefixIndex
from engines.llamacpp.prompt_cache import Entry, PromptCache
from engines.llamacpp.slots import MIN_COPY, Slot
from engines.llamacpp.step_cost import StepCost

_log = logging.getLogger("engines.llamacpp")

_WEIGHT = 0.2  # of the newest measurement in the moving average
_SHARE = 0.25  # of a step that streams take, which copies may take even if that alone is more than the target
_FIRST_GUESS_S = 1e-9  # seconds for a byte, before the first was measured: 1 GB/s


class Saver:
    """Saves and restores the slots of one context.

    Args:
        context: Holds the slots' caches.
        cache: Where to.
        index: Tells what is known already.
        slots: All of the context's.
        cost: Of steps: what a restored token saves.
        limit_s: Seconds that copies and the step after them may take while a stream is watched.
        clock: Seconds.
    """

    def __init__(
        self,
        context: NativeContext,
        cache: PromptCache,
        index: PrefixIndex,
        slots: Seq[Slot],
        *,
        cost: StepCost,
        limit_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._context = context
        self._cache = cache
        self._index = index
        self._slots = slots
        self._cost = cost
        self._limit_s = limit_s
        self._clock = clock
        self._save_s = self._restore_s = _FIRST_GUESS_S
        self._short_of_memory = False
        self.spent_s = 0.0  # on copies since the last step

    @property
    def n_bytes(self) -> int:
        """What is saved takes so much memory."""
        return self._cache.n_bytes

    def next_step(self) -> None:
        """A step follows: what was spent is over."""
        self.spent_s = 0.0

    def pays(self, entry: Entry, shared: int) -> bool:
        """Whether restoring so many tokens is cheaper than computing them, and nobody would wait for it."""
        seconds = entry.state.nbytes * self._restore_s
        return shared >= self._worth(seconds) and self._fits(seconds)

    def save(self, slot: Slot, *, losing: int, then: Entry | None = None) -> None:
        """Keep what a slot holds, if that is worth it.

        Args:
            slot: Its cache is about to be cut or overwritten.
            losing: Tokens at its end that will be gone.
            then: What will be restored before the next step, and takes its share of the time.
        """
        if losing < MIN_COPY or not self._cache.limit_bytes or self._is_kept(slot):
            return
        n_bytes = self._context.state_bytes(slot.index)
        seconds = n_bytes * self._save_s
        if not n_bytes or not self._cache.takes(n_bytes) or losing < 2 * self._worth(seconds):
            return
        if not self._fits(seconds + (0 if then is None else then.state.nbytes * self._restore_s)):
            return
        began = self._clock()
        try:
            state = self._context.save_slot(slot.index, n_bytes)
        except MemoryError:
            self._shrink()
            return
        if state is not None:
            self._cache.add(slot.cached, state)
            took = self._took(began)
            self._save_s += _WEIGHT * (took / n_bytes - self._save_s)

    def restore(self, slot: Slot, entry: Entry) -> bool:
        """Put a saved state into a slot, in place of what it holds; if it cannot be, the slot is empty."""
        if self._context.is_queued(slot.index):
            return False
        began = self._clock()
        if not self._context.restore_slot(slot.index, entry.state):
            self._cache.drop(entry)
            return False
        self._cache.touch(entry)
        took = self._took(began)
        self._restore_s += _WEIGHT * (took / entry.state.nbytes - self._restore_s)
        return True

    def forget(self, tokens: list[int]) -> None:
        """Drop what a run with these tokens may have come from, or was saved of it: its model has computed NaN."""
        entry = self._index.find(tokens).entry
        if entry is not None:
            self._cache.drop(entry)
        self._cache.drop_beginnings(tokens)

    def clear(self) -> None:
        """Forget everything."""
        self._cache.clear()

    def _is_kept(self, slot: Slot) -> bool:
        """Whether what a slot holds is known elsewhere, all but a few tokens."""
        known = self._index.find(slot.cached)
        if known.entry is not None and known.saved == len(slot.cached):
            self._cache.touch(known.entry)
            return True
        elsewhere = [
            held
            for other, held in zip(self._slots, known.held, strict=True)
            if other is not slot and (self._index.cuts or (other.run is None and held == len(other.cached)))
        ]
        return max(elsewhere, default=0) > len(slot.cached) - MIN_COPY

    def _shrink(self) -> None:
        self._cache.halve()
        log = _log.debug if self._short_of_memory else _log.warning
        log("no more host memory for the prompt cache: it takes %d MiB at most now", self._cache.limit_bytes >> 20)
        self._short_of_memory = True

    def _worth(self, seconds: float) -> int:
        """Prompt tokens that a copy must save to pay."""
        token_s = self._cost.token_s()
        return MIN_COPY if not token_s else max(MIN_COPY, math.ceil(seconds / token_s))

    def _fits(self, seconds: float) -> bool:
        streams = [slot.run for slot in self._slots if slot.run is not None and slot.run.decoding]
        if not any(run.sequence.urgent for run in streams):
            return True
        step_s = self._cost.expected_s(decode_rows=len(streams), prefill_tokens=0, position=0) or 0.0
        return self.spent_s + seconds <= max(self._limit_s - step_s, _SHARE * step_s)

    def _took(self, began: float) -> float:
        """Seconds since then, which count as spent."""
        seconds = self._clock() - began
        self.spent_s += seconds
        return seconds
