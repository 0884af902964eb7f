"""The next tokens of a step, from its logits.

Guarantees: each is the token that llama.cpp's chain of samplers draws from all of its row (penalties, top-k, top-p,
min-p, temperature, in this order), whatever other rows the step has. Where a few tokens are enough to know it, only
they are handed to llama.cpp; where they are not, because logits are equal or a sum is too near a limit, all are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as Seq

import numpy as np
import numpy.typing as npt

from engines.llamacpp import nucleus
from engines.llamacpp.draw import draw
from engines.llamacpp.native.sampler import Candidates, NativeSampler
from engines.llamacpp.sampling import Sampler
from engines.llamacpp.shortlist import Columns

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.intp]

SMALL = 1 << 14
"""Vocabulary up to which llama.cpp ranks all tokens as fast as Python finds a few."""
LEADING = 1024
"""Tokens among which the limit that ``top_p`` sets is looked for at first."""


class Chooser:
    """Chooses tokens for the sequences of one model.

    Args:
        ends: Its end-of-generation tokens.
    """

    def __init__(self, ends: Seq[int]) -> None:
        self._ends = ends
        self._candidates = Candidates()

    def choose(self, logits: Floats, samplers: Seq[Sampler | None]) -> list[int | None]:
        """A token for each row, None where its logits are not numbers.

        Args:
            logits: Shape (rows, n_vocab); changed.
            samplers: One for each row, which takes note of the token; None for the highest logit.
        """
        for row, sampler in zip(logits, samplers, strict=True):
            if sampler is not None:
                sampler.adjust(row, ends=self._ends)
        best = logits.argmax(axis=1).tolist()  # the first NaN, if there is one
        tokens = [token if math.isfinite(logits[row, token]) else None for row, token in enumerate(best)]
        drawing = {
            row: sampler
            for row, (token, sampler) in enumerate(zip(tokens, samplers, strict=True))
            if token is not None and sampler is not None and sampler.native is not None
        }
        for row, token in _Drawing(self._candidates, logits, drawing).tokens(best).items():
            tokens[row] = token
        for token, sampler in zip(tokens, samplers, strict=True):
            if token is not None and sampler is not None:
                sampler.took(token)
        return tokens


class _Drawing:
    """The rows of one step from which a token is drawn."""

    def __init__(self, candidates: Candidates, logits: Floats, samplers: Mapping[int, Sampler]) -> None:
        self._candidates = candidates
        self._logits = logits
        self._samplers = samplers

    def tokens(self, best: Seq[int]) -> dict[int, int]:
        """The token of each of these rows; ``best`` are the likeliest ones of all rows."""
        few: dict[int, np.float32] = {}  # rows for which the tokens that reach a logit are enough
        tokens: dict[int, int | None] = dict.fromkeys(self._samplers)
        if self._samplers and self._logits.shape[1] > SMALL:
            self._columns = Columns(self._logits)
            for row, sampler in self._samplers.items():
                if sampler.uniforms is not None:
                    tokens[row] = self._unfiltered(row, sampler)
                elif (floor := self._floor(row, sampler, float(self._logits[row, best[row]]))) is not None:
                    few[row] = floor
        if few:
            lists = self._columns.reaching(list(few), list(few.values()))
            for row, (ids, logits) in zip(few, lists, strict=True):
                tokens[row] = self._from_few(row, ids, logits)
        return {row: self._from_all(row) if token is None else token for row, token in tokens.items()}

    def _floor(self, row: int, sampler: Sampler, peak: float) -> np.float32 | None:
        """A logit such that the tokens that reach it are those to draw from, or the likeliest of them."""
        if 0 < sampler.top_k <= self._columns.count:
            return self._columns.kth(row, sampler.top_k)
        if sampler.min_p:
            least = peak + math.log(sampler.min_p)
            return np.float32(least - 1e-6 * (abs(peak) + abs(least)))  # floats round, and llama.cpp filters again
        if sampler.top_p < 1:
            return self._columns.kth(row, min(LEADING, self._columns.count))
        return None

    def _from_few(self, row: int, ids: Ids, logits: Floats) -> int | None:
        sampler = self._samplers[row]
        if sampler.top_p < 1 and not 0 < sampler.top_k <= self._columns.count:
            return self._nucleus(row, sampler, ids, logits)
        return self._draw(row, sampler, ids, logits, ranks=sampler.top_k > 0)

    def _draw(self, row: int, sampler: Sampler, ids: Ids, logits: Floats, *, ranks: bool) -> int | None:
        """Draw from a list of all tokens that reach some logit; None if equal ones could come in another order."""
        native = _native(sampler)
        self._candidates.fill(ids, logits)
        if not ranks or len(set(logits.tolist())) == len(logits):
            return native.choose(self._candidates)
        saved = native.saved_draw()
        token = native.choose(self._candidates)
        if np.count_nonzero(logits == self._logits[row, token]) == 1:
            native.forget_draw(saved)
            return token
        native.restore_draw(saved)
        return None

    def _nucleus(self, row: int, sampler: Sampler, ids: Ids, logits: Floats) -> int | None:
        """Draw from what ``top_p`` leaves of all, given the likeliest, among which is all that ``min_p`` leaves."""
        order = np.argsort(-logits)
        ids, logits = ids[order], logits[order]
        peak, size, top_p = logits[0], len(ids), sampler.top_p
        shares = nucleus.shares_of(logits, peak)
        if sampler.min_p:
            least = nucleus.at_least(nucleus.shares_of(self._columns.best[row], peak))
            if nucleus.kept_at_least(shares, top_p, least) >= size:
                return self._first(row, sampler, ids, logits, counts=(size, size))
        if not sampler.top_k:
            least, most = nucleus.roughly(nucleus.shares_of(self._logits[row], peak))
            counts = nucleus.kept_at_least(shares, top_p, least), nucleus.kept_at_most(shares, top_p, most)
            if sampler.min_p or counts[1] <= size:
                token = self._first(row, sampler, ids, logits, counts=counts)
                if token is not None:
                    return token
        logits = np.sort(self._logits[row])[::-1][: sampler.top_k or None]
        shares = nucleus.shares_of(logits, peak)
        least, most = nucleus.tightly(shares if sampler.top_k else nucleus.shares_of(self._logits[row], peak))
        counts = nucleus.kept_at_least(shares, top_p, least), nucleus.kept_at_most(shares, top_p, most)
        return self._first(row, sampler, None, logits, counts=counts)

    def _first(
        self, row: int, sampler: Sampler, ids: Ids | None, logits: Floats, *, counts: tuple[int, int]
    ) -> int | None:
        """Draw from the first of these ranked tokens, whose number is between two counts; None if it matters which."""
        native = _native(sampler)
        chosen: set[int] = set()
        first = native.saved_draw()
        again = native.saved_draw()
        for count in {min(count, len(logits)) for count in counts}:
            native.restore_draw(again)
            again = native.saved_draw()
            self._candidates.fill(np.arange(count), logits[:count], ranked=True)
            chosen.add(native.choose(self._candidates, cut=True))
        native.forget_draw(again)
        same = np.flatnonzero(self._logits[row] == logits[chosen.pop()])
        if chosen or len(same) > 1:
            native.restore_draw(first)
            return None
        native.forget_draw(first)
        return int(same[0])

    def _unfiltered(self, row: int, sampler: Sampler) -> int | None:
        assert sampler.uniforms is not None
        token = draw(self._logits[row], sampler.uniforms.next(), temperature=sampler.temperature)
        sampler.missed += 1
        if token is None:
            _native(sampler).skip(sampler.missed - 1)
            sampler.missed = 0
        return token

    def _from_all(self, row: int) -> int:
        self._candidates.fill(np.arange(self._logits.shape[1]), self._logits[row])
        return _native(self._samplers[row]).choose(self._candidates)


def _native(sampler: Sampler) -> NativeSampler:
    assert sampler.native is not None  # a token is drawn
    return sampler.native
