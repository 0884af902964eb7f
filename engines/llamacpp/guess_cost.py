"""What steps with guesses take, learnt from the steps themselves."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import TypeVar

Shape = TypeVar("Shape", bound=Hashable)

_WEIGHT = 0.2  # of the newest measurement in the moving averages

_TRIES = 3
"""Measurements of which the shortest counts: the first step of a shape is no measure for those after it."""

_STALE = 2000
"""Steps after which a measurement is forgotten: the machine may have been busy then."""

_REFRESH = 128
"""Steps with guesses after which one without is measured again."""


@dataclass
class _Price:
    """Seconds of a step of one shape, or of one of its rows."""

    seconds: float
    tries: int
    step: int


class GuessCost:
    """The cost of guesses in one context, by how many streams there are, how many of them guess, and how far."""

    def __init__(self) -> None:
        self._prices: dict[tuple[int, int, int], _Price] = {}
        self._rows: dict[int, _Price] = {}  # what one guess adds, by streams
        self._steps = 0
        self._since_plain: dict[int, int] = {}

    @property
    def is_known(self) -> bool:
        """Whether a step with guesses was ever measured."""
        return bool(self._rows)

    def plain(self, streams: int) -> None:
        """A step of so many streams was made without guesses."""
        self._steps += 1
        self._since_plain[streams] = 0

    def is_plain_due(self, streams: int) -> bool:
        """Whether a step of so many streams should be made without guesses, to know what that takes."""
        return self._since_plain.get(streams, _REFRESH) >= _REFRESH

    def seconds(self, streams: int, guessing: int, guesses: int, *, plain_s: float, row_s: float) -> float:
        """What a step should take.

        Args:
            streams: In it.
            guessing: How many of them guess.
            guesses: For each of these.
            plain_s: What it takes without.
            row_s: What a guess adds, if none was measured.
        """
        price = self._prices.get((streams, guessing, guesses))
        if price is not None and self._is_fresh(price):
            return price.seconds
        return plain_s + guessing * guesses * self._row_s(streams, row_s)

    def _row_s(self, streams: int, unknown_s: float) -> float:
        """What a guess adds beside so many streams; as long as that is not known, the most that one added elsewhere.

        It is more beside many: llama.cpp makes another pass over the weights for what only some of them do.
        """
        row = self._rows.get(streams)
        if row is not None and self._is_fresh(row):
            return row.seconds
        return max((row.seconds for row in self._rows.values() if self._is_fresh(row)), default=unknown_s)

    def _is_fresh(self, price: _Price) -> bool:
        return self._steps - price.step < _STALE

    def observe(self, streams: int, guessing: int, guesses: int, *, plain_s: float, seconds: float) -> None:
        """Learn from a step that was just made."""
        self._steps += 1
        self._since_plain[streams] = self._since_plain.get(streams, 0) + 1
        self._learn(self._prices, (streams, guessing, guesses), seconds)
        self._learn(self._rows, streams, max(0.0, seconds - plain_s) / (guessing * guesses))

    def _learn(self, prices: dict[Shape, _Price], shape: Shape, seconds: float) -> None:
        price = prices.get(shape)
        if price is None or not self._is_fresh(price):
            price = prices[shape] = _Price(seconds, 0, 0)
        price.tries, price.step = price.tries + 1, self._steps
        if price.tries <= _TRIES:
            price.seconds = min(price.seconds, seconds)
        else:
            price.seconds += _WEIGHT * (seconds - price.seconds)
