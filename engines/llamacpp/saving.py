"""What leaves a slot is saved to host memory, and put back for a prompt that begins alike.

Both are copies that nothing else can run beside. While somebody watches a stream, no more of them is made between two
steps than fits the step's target; what does not fit is not saved, and computed again.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from collections.abc import Sequence as Seq

from engines.llamacpp.native.context import NativeContext
from engines.llamacpp.prompt_cache import Entry, PromptCache
from engines.llamacpp.slots import MIN_COPY, Slot, common_prefix
from engines.llamacpp.step_cost import StepCost

_log = logging.getLogger("engines.llamacpp")

_WEIGHT = 0.2  # of the newest measurement in the moving average
_FIRST_GUESS_S = 1e-9  # seconds for a byte, before the first was measured: 1 GB/s


class Saver:
    """Saves and restores the slots of one context.

    Args:
        context: Holds the slots' caches.
        cache: Where to.
        slots: All of the context's.
        cost: Of steps: what a restored token saves.
        limit_s: Seconds that copies may take between two steps while a stream is watched.
        clock: Seconds.
    """

    def __init__(
        self,
        context: NativeContext,
        cache: PromptCache,
        slots: Seq[Slot],
        *,
        cost: StepCost,
        limit_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._context = context
        self._cache = cache
        self._slots = slots
        self._cost = cost
        self._limit_s = limit_s
        self._clock = clock
        self._byte_s = _FIRST_GUESS_S
        self._spent_s = 0.0

    @property
    def n_bytes(self) -> int:
        """What is saved takes so much memory."""
        return self._cache.n_bytes

    def next_step(self) -> None:
        """A step follows: what was spent is over."""
        self._spent_s = 0.0

    def find(self, prompt: Seq[int]) -> tuple[Entry, int] | None:
        """The saved prompt that spares this one most, and how many tokens; None if restoring it would not pay."""
        found = self._cache.find(prompt, at_most=len(prompt) - 1)
        if found is None or found[1] < self.worth(found[0].state.nbytes) or not self._fits(found[0].state.nbytes):
            return None
        return found

    def worth(self, n_bytes: int) -> int:
        """Prompt tokens that so many copied bytes must save to pay."""
        token_s = self._cost.token_s()
        return MIN_COPY if not token_s else max(MIN_COPY, math.ceil(n_bytes * self._byte_s / token_s))

    def save(self, slot: Slot, *, losing: int, then: Entry | None = None) -> None:
        """Keep what a slot holds, if that is worth it.

        Args:
            slot: Its cache is about to be cut or overwritten.
            losing: Tokens at its end that will be gone.
            then: What will be restored before the next step, and takes its share of the time.
        """
        if losing < MIN_COPY or self._cache.knows(slot.cached) or self._held_elsewhere(slot, losing):
            return
        n_bytes = self._context.state_bytes(slot.index)
        if not n_bytes or not self._cache.takes(n_bytes) or losing < 2 * self.worth(n_bytes):
            return
        if not self._fits(n_bytes + (0 if then is None else then.state.nbytes)):
            return
        began = self._clock()
        try:
            state = self._context.save_slot(slot.index, n_bytes)
        except MemoryError:
            self._cache.halve()
            _log.warning(
                "no more host memory for the prompt cache: it is limited to %d MiB now", self._cache.limit_bytes >> 20
            )
            return
        if state is not None:
            self._cache.add(slot.cached, state)
            self._took(n_bytes, self._clock() - began)

    def restore(self, slot: Slot, entry: Entry) -> bool:
        """Put a saved state into a slot, in place of what it holds; if it cannot be, the slot is empty."""
        if self._context.is_queued(slot.index):
            return False
        began = self._clock()
        if not self._context.restore_slot(slot.index, entry.state):
            self._cache.drop(entry)
            return False
        self._cache.touch(entry)
        self._took(entry.state.nbytes, self._clock() - began)
        return True

    def clear(self) -> None:
        """Forget everything."""
        self._cache.clear()

    def _held_elsewhere(self, slot: Slot, losing: int) -> bool:
        kept = len(slot.cached) - losing
        return any(
            common_prefix(slot.cached, other.cached) > len(slot.cached) - max(1, min(MIN_COPY, losing))
            for other in self._slots
            if other is not slot and len(other.cached) > kept
        )

    def _fits(self, n_bytes: int) -> bool:
        watched = any(slot.run is not None and slot.run.decoding and slot.run.sequence.urgent for slot in self._slots)
        return not watched or self._spent_s + n_bytes * self._byte_s <= self._limit_s

    def _took(self, n_bytes: int, seconds: float) -> None:
        self._spent_s += seconds
        self._byte_s += _WEIGHT * (seconds / n_bytes - self._byte_s)
