"""The next tokens of a step, from its logits.

Guarantees: each is the token that llama.cpp's chain of samplers draws from all of its row (penalties, top-k, top-p,
min-p, temperature, in this order), or from those tokens of it that a grammar allows, whatever other rows the step has.
Where a few tokens are enough to know it, only they are handed to llama.cpp; where they are not, because logits are
equal or a sum is too near a limit, all are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as Seq

import numpy as np
import numpy.typing as npt

from engines.llamacpp import nucleus
from engines.llamacpp.draw import draw
from engines.llamacpp.grammar import Allowed
from engines.llamacpp.native.sampler import Candidates, NativeSampler
from engines.llamacpp.nucleus import Leading, Spread
from engines.llamacpp.sampling import Sampler
from engines.llamacpp.shortlist import Columns

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.intp]

SMALL = 1 << 14
"""Vocabulary up to which llama.cpp ranks all tokens as fast as Python finds a few."""


def _note(tokens: Seq[int | None], samplers: Seq[Sampler | None]) -> None:
    for token, sampler in zip(tokens, samplers, strict=True):
        if token is not None and sampler is not None:
            sampler.took(token)


NOTHING_SAID: Mapping[int, Allowed] = {}
"""Every token may be chosen."""


class Chooser:
    """Chooses tokens for the sequences of one model.

    Args:
        ends: Its end-of-generation tokens.
    """

    def __init__(self, ends: Seq[int]) -> None:
        self._ends = ends
        self._room = Candidates(), np.empty((2, 0), np.float32)

    def choose(
        self, logits: Floats, samplers: Seq[Sampler | None], allowed: Mapping[int, Allowed] = NOTHING_SAID
    ) -> list[int | None]:
        """A token for each row, None where its logits are not numbers.

        Args:
            logits: Shape (rows, n_vocab); changed.
            samplers: One for each row, which takes note of the token; None for the highest logit.
            allowed: By row, the tokens to choose among, where these are not all.
        """
        for row, sampler in zip(logits, samplers, strict=True):
            if sampler is not None:
                sampler.adjust(row, ends=self._ends)
        few = _few(logits, allowed)
        drawing = {row: one for row, one in enumerate(samplers) if one and one.native and row not in few}
        tokens: list[int | None] = [None] * len(logits)
        if len(drawing) + len(few) < len(tokens):
            best = logits.argmax(axis=1).tolist()  # the first NaN, if there is one
            tokens = [token if math.isfinite(logits[row, token]) else None for row, token in enumerate(best)]
        if drawing:
            if self._room[1].shape[1] < logits.shape[1]:
                self._room = Candidates(), np.empty((2, logits.shape[1]), np.float32)
            for row, token in _Drawing(logits, drawing, self._room).tokens().items():
                tokens[row] = token
        for row, ids in few.items():
            tokens[row] = self._among(ids, logits[row, ids], samplers[row])
        _note(tokens, samplers)
        return tokens

    def _among(self, ids: Ids, logits: Floats, sampler: Sampler | None) -> int | None:
        """The token of a row of which only these may be chosen."""
        best = int(logits.argmax())
        if not math.isfinite(logits[best]):
            return None
        if sampler is None or sampler.native is None or len(ids) == 1:
            return int(ids[best])
        self._room[0].fill(ids, logits)
        return sampler.native.choose(self._room[0])


def _few(logits: Floats, allowed: Mapping[int, Allowed]) -> dict[int, Ids]:
    """The rows of which only a few tokens are allowed; from the others, those that are barred are taken away."""
    few: dict[int, Ids] = {}
    for row, among in allowed.items():
        if among.few is None:
            logits[row, among.barred] = -np.inf
        else:
            few[row] = among.few
    return few


class _Drawing:
    """The rows of one step from which a token is drawn."""

    def __init__(self, logits: Floats, samplers: Mapping[int, Sampler], room: tuple[Candidates, Floats]) -> None:
        self._logits = logits
        self._samplers = samplers
        self._candidates, self._scratch = room
        self._columns = Columns(logits)
        small = logits.shape[1] <= SMALL
        ks = {row: one.top_k for row, one in samplers.items() if not small and 0 < one.top_k <= self._columns.count}
        self._kth = self._columns.kth(ks)  # a logit that the token in place ``top_k`` of a row reaches

    def tokens(self) -> dict[int, int | None]:
        """The token of each of these rows, None where its logits are not numbers."""
        peaks = self._columns.peaks()
        few: dict[int, np.float32] = {}  # rows for which the tokens that reach a logit are enough
        tokens: dict[int, int | None] = dict.fromkeys(self._samplers)
        for row, sampler in self._samplers.items():
            if not math.isfinite(peaks[row]) or self._logits.shape[1] <= SMALL:
                continue
            if sampler.uniforms is not None:
                tokens[row] = self._unfiltered(row, sampler, peaks[row])
            elif (floor := self._floor(row, sampler, float(peaks[row]))) is not None:
                few[row] = floor
            elif sampler.top_p < 1:
                tokens[row] = self._nucleus(row, sampler, peaks[row])
        if few:
            lists = self._columns.reaching(list(few), list(few.values()))
            for row, (ids, logits) in zip(few, lists, strict=True):
                tokens[row] = self._from_few(row, ids, logits)
        for row in tokens:
            if tokens[row] is None and math.isfinite(peaks[row]):
                tokens[row] = self._from_all(row)
        return tokens

    def _floor(self, row: int, sampler: Sampler, peak: float) -> np.float32 | None:
        """A logit such that the tokens that reach it are all to draw from, where the settings tell one."""
        if row in self._kth:
            return self._kth[row]
        if sampler.min_p:
            least = peak + math.log(sampler.min_p)
            return np.float32(least - 1e-6 * (abs(peak) + abs(least)))  # floats round, and llama.cpp filters again
        return None

    def _from_few(self, row: int, ids: Ids, logits: Floats) -> int | None:
        """Draw from these tokens or from the likeliest of them."""
        sampler, count = self._samplers[row], self._columns.count
        if sampler.top_p == 1 or 0 < sampler.top_k <= count:
            return self._draw(row, sampler, ids, logits, ranks=sampler.top_k > 0)
        leading = Leading.of(ids, logits, logits.max())
        least = nucleus.at_least(nucleus.shares_of(self._columns.best[row], leading.logits[0]))
        if leading.kept(sampler.top_p, least, least)[0] >= len(ids):
            return self._first(row, sampler, leading, counts=(len(ids), len(ids)))
        return self._nucleus(row, sampler, leading.logits[0], leading)

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

    def _nucleus(self, row: int, sampler: Sampler, peak: np.float32, filtered: Leading | None = None) -> int | None:
        """Draw from what ``top_p`` leaves of all, or of the ``top_k`` likeliest.

        Args:
            row: Which.
            sampler: Its.
            peak: Its highest logit.
            filtered: The tokens that ``min_p`` leaves; None where it is off.
        """
        logits = self._logits[row]
        if sampler.top_k:
            logits = np.sort(logits)[::-1][: sampler.top_k]
        spread = Spread(logits, peak, self._scratch)
        for least, most in spread.bounds():
            leading = filtered or spread.leading(sampler.top_p, most)
            if leading is None:
                continue
            counts = leading.kept(sampler.top_p, least, most)
            if filtered is None and counts[1] > len(leading.ids):
                continue
            token = self._first(row, sampler, leading, counts=counts)
            if token is not None:
                return token
        return None

    def _first(self, row: int, sampler: Sampler, leading: Leading, *, counts: tuple[int, int]) -> int | None:
        """Draw from the first of these tokens, whose number is between two counts; None if it matters which."""
        native = _native(sampler)
        first = native.saved_draw()
        places: set[int] = set()
        for count in {min(count, len(leading.ids)) for count in counts}:
            if places:
                native.restore_draw(first)
                first = native.saved_draw()
            self._candidates.fill(np.arange(count), leading.logits[:count], ranked=True)
            places.add(native.choose(self._candidates, cut=True))
        place = places.pop()
        token = None
        if not places:
            among = self._logits[row] if sampler.top_k else self._logits[row, leading.ids]
            same = np.flatnonzero(among == leading.logits[place])  # equal ones could come in another order
            if len(same) == 1:
                token = int(same[0] if sampler.top_k else leading.ids[same[0]])
        if token is None:
            native.restore_draw(first)
        else:
            native.forget_draw(first)
        return token

    def _unfiltered(self, row: int, sampler: Sampler, peak: np.float32) -> int | None:
        assert sampler.uniforms is not None
        uniform, warmth = sampler.uniforms.next(), sampler.temperature
        token = draw(self._logits[row], peak, uniform, temperature=warmth, scratch=self._scratch[0])
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
