"""How many of the most likely tokens ``top_p`` keeps: bounds that hold for llama.cpp's own sums, without its sort.

llama.cpp adds floats one after another, in the order of token ids if nothing has sorted them, and then adds the shares
of the ranked tokens until they reach ``top_p``. Adding a float rounds by at most half a unit in the last place of the
sum, and by at most the number that is added; and a sum of larger floats is not smaller. llama.cpp's exponentials are
accurate to one unit in the last place, numpy's to four.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.intp]

ULP = 2.0**-23
"""Of a float, relative to it, at most."""
HALF = 0.51 * ULP
"""By which adding to a sum rounds at most, relative to the sum."""
LESS, MORE = np.float32(1 - 6 * ULP), np.float32(1 + 6 * ULP)
"""From one of numpy's exponentials to what llama.cpp's is at least, and at most."""
SPARE = 100 * ULP
"""How far a sum of shares may be from llama.cpp's for other reasons than that one's rounding: exponentials by 6 units,
by 52 more where the likeliest token's logit is not taken away first, and sums of 16 by 16."""
PLAIN = 64
"""Largest logit of which an exponential leaves room for a sum of all tokens' in a float."""
FOLD = 16
"""Tokens whose shares are added first. Of more, fewer sums have to be looked at, but these bound less well."""
CROWD = 4
"""Of so many sums one may be looked behind; if there are more, all tokens are as fast."""
LIKELY = (1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6, 1e-6, 3e-7, 1e-7)
"""Shares of all from which on tokens are ranked, until there are enough of them."""


def shares_of(logits: Floats, peak: np.float32, *, out: Floats | None = None) -> Floats:
    """Probabilities of tokens, relative to that of the likeliest; ``out`` is room for them."""
    shares: Floats = np.subtract(logits, peak, out=out)
    return np.exp(shares, out=shares)


def at_least(some: Floats) -> float:
    """What llama.cpp's sum of all shares reaches, if these are among them: a sum that leaves some out is not larger."""
    return float(some.sum(dtype=np.float64)) * (1 - (6 + len(some)) * ULP)


class Leading(NamedTuple):
    """The most likely tokens of a row.

    Attributes:
        ids: By ascending id.
        logits: Theirs, descending.
        shares: In the same order.
    """

    ids: Ids
    logits: Floats
    shares: Floats

    @classmethod
    def of(cls, ids: Ids, logits: Floats, peak: np.float32) -> Leading:
        """From ids and their logits, in the same order."""
        ranked = np.sort(logits)[::-1]
        return cls(ids, ranked, shares_of(ranked, peak))

    def kept(self, top_p: float, least: float, most: float) -> tuple[int, int]:
        """How many of all tokens ``top_p`` keeps at least and at most, up to ``len(ids) + 1``, which stands for more.

        Args:
            top_p: Below 1.
            least: What the sum of the shares of all tokens is at least.
            most: What it is at most.
        """
        limit = np.float32(top_p)
        return (
            1 + int(np.cumsum(self.shares * np.float32(MORE / least)).searchsorted(limit)),
            1 + int(np.cumsum(self.shares * np.float32(LESS / most)).searchsorted(limit)),
        )


class Spread:
    """How the probability of a row is spread over its tokens.

    Args:
        logits: Of all tokens.
        peak: The highest of them.
        room: For twice as many numbers, shape (2, n): to make it each time takes as long as to fill it.
    """

    def __init__(self, logits: Floats, peak: np.float32, room: Floats) -> None:
        self._logits, self._peak = logits, peak
        self._shares, self._scratch = room[0, : len(logits)], room[1, : len(logits)]
        plain = abs(peak) < PLAIN
        self._unit = math.exp(peak) if plain else 1.0  # the likeliest token's share
        if plain:
            np.exp(logits, out=self._shares)
        else:
            shares_of(logits, peak, out=self._shares)
        self._columns = len(logits) // FOLD
        folded = self._columns * FOLD
        self._folded, self._left_over = self._shares[:folded].reshape(FOLD, -1), self._shares[folded:]
        self._sums = np.concatenate([self._folded.sum(axis=0), self._left_over])
        self._total = float(self._sums.sum(dtype=np.float64))

    def bounds(self) -> Iterator[tuple[float, float]]:
        """Bounds of llama.cpp's sum of all shares: closer ones each time, which take longer."""
        for bound in self._roughly, self._closely, self._tightly:
            yield bound()

    def _roughly(self) -> tuple[float, float]:
        """As far apart as its rounding can move it, by the sums alone."""
        return self._around(np.minimum(self._sums, np.float32(FOLD * HALF * self._total)))

    def _closely(self) -> tuple[float, float]:
        """As far apart as rounding can move it, by each share and what has been added with it at most."""
        added = np.append(self._folded.sum(axis=1, dtype=np.float64).cumsum(), self._total)
        most = (added * (1 + SPARE) * HALF).astype(np.float32)
        scratch = self._scratch[: self._folded.size].reshape(FOLD, -1)
        lost = np.minimum(self._folded, most[:-1, None], out=scratch).sum(axis=0)
        return self._around(np.append(lost, np.minimum(self._left_over, most[-1])))

    def _around(self, lost: Floats) -> tuple[float, float]:
        """Bounds, from what rounding loses or adds at most."""
        moved = float(lost.sum(dtype=np.float64)) + SPARE * self._total
        return (self._total - moved) / self._unit, (self._total + moved) / self._unit

    def _tightly(self) -> tuple[float, float]:
        """Added as there."""
        return self._added(LESS), self._added(MORE)

    def _added(self, factor: np.float32) -> float:
        shares = shares_of(self._logits, self._peak, out=self._scratch)
        return float(np.cumsum(np.multiply(shares, factor, out=shares), out=shares)[-1])

    def leading(self, top_p: float, most: float) -> Leading | None:
        """About as many tokens as ``top_p`` keeps, and more rather than fewer; None if it keeps nearly all.

        Args:
            top_p: Below 1.
            most: What the sum of the shares of all tokens is at most.
        """
        whole = most * self._unit
        for share in (*LIKELY, (1 - top_p) / len(self._logits) / 2):
            floor = np.float32(share * whole)
            columns = np.flatnonzero(self._sums >= floor)
            if float(self._sums[columns].sum(dtype=np.float64)) < top_p * whole:
                continue  # these hold what reaches the floor, and more
            ids = self._reaching(floor, columns)
            if float(self._shares[ids].sum(dtype=np.float64)) > top_p * whole:
                return Leading.of(ids, self._logits[ids], self._peak)
        return None

    def _reaching(self, floor: np.float32, columns: Ids) -> Ids:
        """The tokens with such a share, which are in these columns."""
        if len(columns) * CROWD > self._columns:
            return np.flatnonzero(self._shares >= floor)
        folded, single = columns[columns < self._columns], columns[columns >= self._columns]
        found = np.flatnonzero(self._folded.take(folded, axis=1) >= floor)
        depths, places = np.divmod(found, len(folded))
        return np.concatenate([depths * self._columns + folded[places], single + (FOLD - 1) * self._columns])
