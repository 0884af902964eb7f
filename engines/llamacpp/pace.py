"""How many prompt tokens fit into a step, learnt from the steps themselves."""

from __future__ import annotations

MIN_CHUNK = 16
"""Prompt tokens in a step even where they do not fit: fewer cost a step nearly as much and starve the prompt."""

_FIRST_CHUNK = 32
_WEIGHT = 0.2  # of the newest measurement in the moving averages
_CLOCK_TICK_S = 1e-6  # no step takes less


class Pace:
    """A cost model of one context: a step takes the decode rows' time plus so much for each prompt token.

    Args:
        target_s: How long a step with running streams may take.
        max_rows: Most rows in a step.
    """

    def __init__(self, target_s: float, max_rows: int) -> None:
        self._target_s = target_s
        self._max_rows = max_rows
        self._decode_s: dict[int, float] = {}  # rows -> seconds of a step with nothing else
        self._token_s: float | None = None  # seconds a prompt token adds

    def prefill_budget(self, decode_rows: int) -> int:
        """Prompt tokens for a step beside so many running streams; no limit but the batch beside none.

        Where the streams alone take more than half of the target, prefill gets as much time as they do: the pace of the
        streams halves at worst, and a prompt does not starve on a slow machine.
        """
        if decode_rows == 0:
            return self._max_rows
        if self._token_s is None:
            return min(_FIRST_CHUNK, self._max_rows)
        decode_s = self._decode_time(decode_rows)
        left_s = max(self._target_s - decode_s, decode_s)
        return min(max(MIN_CHUNK, int(left_s / self._token_s)), self._max_rows)

    def observe(self, *, decode_rows: int, prefill_tokens: int, seconds: float) -> None:
        """Learn from a step that was just made."""
        if prefill_tokens == 0:
            self._decode_s[decode_rows] = _average(self._decode_s.get(decode_rows), seconds)
            return
        rest_s = max(seconds - self._decode_time(decode_rows), seconds / 10, _CLOCK_TICK_S)
        self._token_s = _average(self._token_s, rest_s / prefill_tokens)

    def _decode_time(self, rows: int) -> float:
        if rows == 0 or not self._decode_s:
            return 0.0
        nearest = min(self._decode_s, key=lambda known: abs(known - rows))
        return self._decode_s[nearest]


def _average(old: float | None, new: float) -> float:
    return new if old is None else old + _WEIGHT * (new - old)
