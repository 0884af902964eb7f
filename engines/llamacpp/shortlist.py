"""The few tokens among which the most likely ones are, so that nobody need rank a whole vocabulary.

The vocabulary is folded into columns. In each of the ``k`` best columns there is a token as likely as the best of the
last one of them, so the token in place ``k`` is not less likely than that. And only columns whose best token is likely
enough have to be looked through for others. Each call to numpy is for all rows of a step: one that works on so many
numbers gives up Python's lock, and may wait for it afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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

    def kth(self, ks: Mapping[int, int]) -> dict[int, np.float32]:
        """For each of these rows a logit that the token in place ``k`` reaches, and not many others do.

        Args:
            ks: ``k`` by row, `count` at most.
        """
        again = self.count // AGAIN
        rows_of: dict[int, list[int]] = {}
        for row, k in ks.items():
            rows_of.setdefault(k, []).append(row)
        found: dict[int, np.float32] = {}
        for k, rows in rows_of.items():
            if 4 * k > again:
                best = self.best[rows]
                best.partition(self.count - k, axis=1)
                found.update(zip(rows, best[:, self.count - k], strict=True))
                continue
            if self._sorted is None:
                folded = self.best[:, : again * AGAIN].reshape(len(self.best), AGAIN, again)
                self._sorted = np.sort(folded.max(axis=1), axis=1)
            found.update({row: self._sorted[row, -k] for row in rows})
        return found

    def reaching(self, rows: Sequence[int], least: Sequence[np.float32]) -> list[tuple[Ids, Floats]]:
        """Ids and logits of all tokens of these rows that reach the logit given for each, by ascending id."""
        floors, whole = np.array(least, np.float32), np.array(rows, np.intp)
        reach = self.best[whole] >= floors[:, None]
        crowded = np.count_nonzero(reach, axis=1) * MANY > self.count
        reach[crowded] = False
        of, columns = np.nonzero(reach)
        found = self._folded[whole[of], :, columns]
        hits, depths = np.nonzero(found >= floors[of, None])
        owners, ids, logits = of[hits], depths * self.count + columns[hits], found[hits, depths]
        if self._left_over.size:
            extra, places = np.nonzero((self._left_over[whole] >= floors[:, None]) & ~crowded[:, None])
            owners = np.concatenate([owners, extra])
            ids = np.concatenate([ids, places + self.count * FOLD])
            logits = np.concatenate([logits, self._left_over[whole[extra], places]])
        order = (owners * self._logits.shape[1] + ids).argsort()
        ids, logits = ids[order], logits[order]
        ends = np.bincount(owners, minlength=len(rows)).cumsum().tolist()
        lists = [(ids[start:end], logits[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
        for number in np.flatnonzero(crowded).tolist():
            mine = np.flatnonzero(self._logits[rows[number]] >= floors[number])
            lists[number] = mine, self._logits[rows[number], mine]
        return lists
