"""The guesses of one stream, and how often they are right: counted at every token, whether checked or not."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Protocol

_AGREED = (1, 2, 3, 5, 9, 17, 32)
"""Tokens that agreed before a guess: what is told apart."""

_AT_FIRST = (0.1, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Shares of right guesses before any was counted."""

_TRUST = 6.0
"""Guesses of a stream that count as much as what is known of all others'."""

_KEEP_OWN, _KEEP_ALL = 0.97, 0.99
"""How much of what was counted is kept with each new guess, of a stream's own and of all."""

_UNLIKELY = 0.1
"""Guesses that are right less often are not worth a thought."""


class Source(Protocol):
    """Where guesses come from: a text that has been written before, or another model."""

    @property
    def agree(self) -> int:
        """How sure the next guess is, in tokens that were as guessed before it."""

    @property
    def expected(self) -> int | None:
        """The first token of a guess; None if there is none."""

    def took(self, token: int) -> None:
        """The text goes on with this token."""

    def guess(self, most: int) -> Sequence[int]:
        """The next tokens, at most so many."""


class Shares:
    """How often guesses were right, by how much of the text agreed before them."""

    def __init__(self) -> None:
        self.right = [_TRUST * share for share in _AT_FIRST]
        self.all = [_TRUST] * len(_AT_FIRST)

    def note(self, level: int, right: bool) -> None:
        """A guess was right, or was not."""
        self.right[level] = _KEEP_ALL * self.right[level] + right
        self.all[level] = _KEEP_ALL * self.all[level] + 1


class Guesser:
    """The guesses of one stream, and how often they are right.

    Args:
        source: Where they come from.
        shares: Of all streams of this model.
    """

    def __init__(self, source: Source, shares: Shares) -> None:
        self._source = source
        self._shares = shares
        self._right = [0.0] * len(_AT_FIRST)
        self._all = [0.0] * len(_AT_FIRST)

    def took(self, token: int) -> None:
        """The text goes on with this token."""
        source = self._source
        expected = source.expected
        if expected is not None:
            level, right = bisect_right(_AGREED, source.agree), expected == token
            self._shares.note(level, right)
            self._right[level] = _KEEP_OWN * self._right[level] + right
            self._all[level] = _KEEP_OWN * self._all[level] + 1
        source.took(token)

    def guess(self, most: int) -> Sequence[int]:
        """The next tokens, at most so many."""
        return self._source.guess(most)

    def promise(self, most: int) -> list[float]:
        """How many tokens the first, the first two, … of at most so many guesses will probably spare."""
        promised: list[float] = []
        if self._source.expected is None:
            return promised
        share, sum_ = 1.0, 0.0
        for agree in range(self._source.agree, self._source.agree + most):
            share *= self._share(bisect_right(_AGREED, agree))
            if share < _UNLIKELY:
                break
            sum_ += share
            promised.append(sum_)
        return promised

    def _share(self, level: int) -> float:
        known = self._shares.right[level] / self._shares.all[level]
        return (self._right[level] + _TRUST * known) / (self._all[level] + _TRUST)
