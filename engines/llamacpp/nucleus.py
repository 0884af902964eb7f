"""How many of the most likely tokens ``top_p`` keeps: bounds that hold for llama.cpp's own sums, without its sort.

llama.cpp adds floats one after another, by token id where nothing has sorted them yet, and then the shares of the
ranked tokens until they reach ``top_p``. Adding a float rounds by no more than the half of a unit in the last place of
the sum, and by no more than what is added; and a sum of larger floats is not smaller. Its exponentials are good to one
unit in the last place, and numpy's to four.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

ULP = 2.0**-23
"""Of a float, relative to it, at most."""
LESS, MORE = np.float32(1 - 6 * ULP), np.float32(1 + 6 * ULP)
"""From one of numpy's exponentials to what llama.cpp's is at least, and at most."""


def shares_of(logits: Floats, peak: np.float32) -> Floats:
    """Probabilities of tokens, relative to that of the likeliest."""
    shares: Floats = np.subtract(logits, peak)
    return np.exp(shares, out=shares)


def at_least(some: Floats) -> float:
    """What llama.cpp's sum of all shares reaches, if these are among them: a sum that leaves some out is not larger."""
    return float(some.sum(dtype=np.float64)) * (1 - (6 + len(some)) * ULP)


def roughly(shares: Floats) -> tuple[float, float]:
    """Bounds of llama.cpp's sum of these: few operations, and bounds that are as far apart as its rounding can be."""
    total = float(shares.sum())  # numpy adds in pairs: 27 roundings at most
    lost = float(np.minimum(shares, np.float32(total * 0.51 * ULP)).sum())
    return total * (1 - 40 * ULP) - lost, total * (1 + 40 * ULP) + lost


def tightly(shares: Floats) -> tuple[float, float]:
    """Bounds of llama.cpp's sum of these, added in this order, one after another as there."""
    return float(np.cumsum(shares * LESS)[-1]), float(np.cumsum(shares * MORE)[-1])


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
