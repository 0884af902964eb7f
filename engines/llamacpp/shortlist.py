"""The few tokens among which the most likely ones are, so that nobody need rank a whole vocabulary.

The vocabulary is folded into columns. In each of the ``k`` best columns there is a token as likely as the best of the
last one of them, so the token in place ``k`` is not less likely than that. And only columns whose best token is likely
enough have to be looked through for others. Each call to numpy is for all rows of a step: one that works on so many
numbers gives up Python's lock, and may wait for it afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.intp]

FOLD = 64
"""Tokens in a column. More of them make fewer columns, which bound the list less well; fewer take longer to fold."""

AGAIN = 16
"""Columns in a column of columns, whose best are few enough to be sorted for every row of a step."""

MANY = 4
"""Of so many columns one may be looked through; if there are more, the whole row is as fast."""


class Columns:
    """The rows of logits of a step, folded.

    Args:
        logits: Shape (rows, n_vocab).

    Attributes:
        count: Columns of each row.
        best: Logits of their best tokens, shape (rows, count).
    """

    def __init__(self, logits: Floats) -> None:
        self._logits = logits
        rows, n_vocab = logits.shape
        self.count = n_vocab // FOLD
        self._folded = logits[:, : self.count * FOLD].reshape(rows, FOLD, self.count)
        self._left_over = logits[:, self.count * FOLD :]
        self.best: Floats = self._folded.max(axis=1)
        self._sorted: Floats | None = None

    def peaks(self) -> Floats:
        """The highest logit of each row; NaN if it has one."""
        left_over = self._left_over.max(axis=1, initial=-np.inf)
        peaks: Floats = np.maximum(self.best.max(axis=1, initial=-np.inf), left_over)
        return peaks

    def kth(self, row: int, k: int) -> np.float32:
        """A logit that the token in place ``k`` of a row reaches, and not many others do; ``k`` is at most `count`."""
        again = self.count // AGAIN
        if 4 * k > again:
            return np.float32(np.partition(self.best[row], self.count - k)[self.count - k])
        if self._sorted is None:
            rows = len(self.best)
            self._sorted = np.sort(self.best[:, : again * AGAIN].reshape(rows, AGAIN, again).max(axis=1), axis=1)
        return np.float32(self._sorted[row, -k])

    def reaching(self, rows: Sequence[int], least: Sequence[np.float32]) -> list[tuple[Ids, Floats]]:
        """Ids and logits of all tokens of these rows that reach the logit given for each, by ascending id."""
        floors = np.array(least, np.float32)
        reach = self.best[rows] >= floors[:, None]
        crowded = np.count_nonzero(reach, axis=1) * MANY > self.count
        reach[crowded] = False
        of, columns = np.nonzero(reach)
        found = self._folded[np.array(rows, np.intp)[of], :, columns]
        hits, depths = np.nonzero(found >= floors[of, None])
        owners, ids, logits = of[hits], depths * self.count + columns[hits], found[hits, depths]
        lists = []
        for number, (row, floor) in enumerate(zip(rows, floors, strict=True)):
            if crowded[number]:
                mine = np.flatnonzero(self._logits[row] >= floor)
                lists.append((mine, self._logits[row, mine]))
                continue
            own = slice(*np.searchsorted(owners, [number, number + 1]))
            order = ids[own].argsort()
            last = np.flatnonzero(self._left_over[row] >= floor)
            lists.append(
                (
                    np.concatenate([ids[own][order], last + self.count * FOLD]),
                    np.concatenate([logits[own][order], self._left_over[row, last]]),
                )
            )
        return lists
