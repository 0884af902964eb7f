"""The few tokens among which the most likely ones are, so that a sampler need not rank a whole vocabulary."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FOLD = 64
"""Tokens in a column. More of them make fewer columns, which bound the list less well; fewer take longer to fold."""

WORTH_IT = 1 << 19
"""Logits of a step from which on it pays; fewer of them llama.cpp ranks as fast as Python finds the list."""


def shortlist(logits: npt.NDArray[np.float32], k: int) -> npt.NDArray[np.intp] | None:
    """All tokens that are as likely as the one in place ``k`` or more, with few others.

    The vocabulary is folded into columns. In each of the ``k`` best columns there is a token as likely as the best of
    the last one of them, so the token in place ``k`` is not less likely than that.

    Args:
        logits: Of one row, shape (n_vocab,), without NaN.
        k: 1 or more.

    Returns:
        Their ids, ascending; None where the vocabulary has not so many columns.
    """
    columns = len(logits) // FOLD
    if columns < k:
        return None
    best = logits[: columns * FOLD].reshape(FOLD, columns).max(axis=0)
    least = np.partition(best, columns - k)[columns - k]
    return np.flatnonzero(logits >= least)
