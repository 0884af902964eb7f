"""How many of the most likely tokens ``top_p`` keeps: bounds that hold for llama.cpp's own sums, without its sort.

llama.cpp adds floats one after another, in the order of token ids if nothing has sorted them, and then adds the shares
of the ranked tokens until they reach ``top_p``. Adding a float rounds by at most half a unit in the last place of the
sum, and by at most the number that is added; and a sum of larger floats is not smaller. llama.cpp's exponentials are
accurate to one unit in the last place, numpy's to four.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.intp]

ULP = 2.0**-23
"""Of a float, relative to it, at most."""
FEW = 4096
"""Tokens up to which they are sorted together with their ids, which takes ten times as long."""
LESS, MORE = np.float32(1 - 6 * ULP), np.float32(1 + 6 * ULP)
"""From one of numpy's exponentials to what llama.cpp's is at least, and at most."""


def shares_of(logits: Floats, peak: np.float32, *, out: Floats | None = None) -> Floats:
    """Probabilities of tokens, relative to that of the likeliest; ``out`` is room for them."""
    shares: Floats = np.subtract(logits, peak, out=out)
    return np.exp(shares, out=shares)


def at_least(some: Floats) -> float:
    """What llama.cpp's sum of all shares reaches, if these are among them: a sum that leaves some out is not larger."""
    return float(some.sum(dtype=np.float64)) * (1 - (6 + len(some)) * ULP)


def roughly(shares: Floats, scratch: Floats) -> tuple[float, float]:
    """Bounds of llama.cpp's sum of these, as far apart as its rounding can move it; ``scratch`` is room for as many."""
    total = float(shares.sum())  # numpy adds in pairs: 27 roundings at most
    lost = float(np.minimum(shares, np.float32(total * 0.51 * ULP), out=scratch).sum())
    return total * (1 - 40 * ULP) - lost, total * (1 + 40 * ULP) + lost


def tightly(shares: Floats, scratch: Floats) -> tuple[float, float]:
    """Bounds of llama.cpp's sum of these in this order, added as there: far fewer, and five times as long."""
    least = np.cumsum(np.multiply(shares, LESS, out=scratch), out=scratch)[-1]
    return float(least), float(np.cumsum(np.multiply(shares, MORE, out=scratch), out=scratch)[-1])


def ranked(logits: Floats, shares: Floats, floor: np.float32) -> tuple[Ids | None, Floats]:
    """All tokens whose share reaches a floor: their logits, descending, and, if they are few, their ids."""
    ids = np.flatnonzero(shares >= floor)
    if len(ids) > FEW:
        return None, np.sort(logits[ids])[::-1]
    order = np.argsort(-logits[ids])
    return ids[order], logits[ids[order]]


def kept_at_least(shares: Floats, top_p: float, total: float) -> int:
    """How many tokens ``top_p`` keeps at least, up to ``len(shares) + 1``, which stands for more.

    Args:
        shares: Of the most likely tokens, descending.
        top_p: Below 1.
        total: What the sum of the shares of all tokens is at least.
    """
    return 1 + int(np.cumsum(shares * np.float32(MORE / total)).searchsorted(np.float32(top_p)))


def kept_at_most(shares: Floats, top_p: float, total: float) -> int:
    """How many tokens ``top_p`` keeps at most, up to ``len(shares) + 1``; ``total`` is what the sum is at most."""
    return 1 + int(np.cumsum(shares * np.float32(LESS / total)).searchsorted(np.float32(top_p)))
