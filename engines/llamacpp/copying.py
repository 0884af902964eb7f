"""Copies between slots' caches, and what they cost: measured, because it depends on model, machine and context."""

from __future__ import annotations

import math
from collections.abc import Callable

from engines.llamacpp.native.context import NativeContext
from engines.llamacpp.slots import MIN_COPY
from engines.llamacpp.step_cost import StepCost

_WEIGHT = 0.2  # of the newest measurement in the moving averages


class CopyCost:
    """What copies cost: so much for each token that is held, or for a whole slot, by the way that was taken."""

    def __init__(self) -> None:
        self._token_s = self._slot_s = 0.0

    def seconds(self, tokens: int, *, whole: bool) -> float:
        """The price of a copy of this many tokens; 0 before the first was measured."""
        return self._slot_s if whole else self._token_s * tokens

    def observe(self, tokens: int, seconds: float, *, whole: bool) -> None:
        """Learn from a copy that was just made."""
        if whole:
            self._slot_s = _average(self._slot_s, seconds)
        elif tokens:
            self._token_s = _average(self._token_s, seconds / tokens)


class Copier:
    """Copies caches of one context, and tells whether it pays.

    Args:
        context: Holds the slots' caches.
        cost: Of steps: what a copy may save.
        clock: Seconds.
    """

    def __init__(self, context: NativeContext, cost: StepCost, clock: Callable[[], float]) -> None:
        self._context = context
        self._steps = cost
        self._copies = CopyCost()
        self._clock = clock
        self._queued = 0

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Replace a slot's cache by a copy of another's, which holds this many tokens."""
        began = self._clock()
        if self._context.copy_slot(source, target, tokens):
            self._copies.observe(tokens, self._clock() - began, whole=False)
        else:
            self._queued += 1

    def take_queued(self) -> int:
        """How many copies the next step makes before it computes; they are its own from now on."""
        queued, self._queued = self._queued, 0
        return queued

    def queued_took(self, count: int, seconds: float) -> None:
        """So many copies made a step so much longer."""
        self._copies.observe(0, max(0.0, seconds / count), whole=True)

    def worth(self, tokens: int) -> int:
        """Prompt tokens that copying a slot with this many tokens must save to be worth it."""
        token_s = self._steps.token_s()
        return MIN_COPY if not token_s else max(MIN_COPY, math.ceil(self._seconds(tokens) / token_s))

    def payback(self, tokens: int) -> int:
        """After how many steps with one pass less a copy of a slot with this many tokens has paid off."""
        stream_s = self._steps.stream_s()
        return 0 if not stream_s else math.ceil(self._seconds(tokens) / stream_s)

    def _seconds(self, tokens: int) -> float:
        return self._copies.seconds(tokens, whole=not self._context.copies_held(tokens))


def _average(known: float, newest: float) -> float:
    return known + _WEIGHT * (newest - known) if known else newest
