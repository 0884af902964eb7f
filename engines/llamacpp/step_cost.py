"""How many prompt tokens fit into a step, learnt from the steps themselves."""

from __future__ import annotations

from engines.api import ALONE, Beside

MIN_CHUNK = 16
"""Prompt tokens in a step even where they do not fit: fewer cost a step nearly as much and starve the prompt."""

TILE = 64
"""Rows from which on llama.cpp's flash attention on a CPU works in tiles; of fewer, each costs up to twice as much."""

GRAIN = 32
"""Chunks of more than a tile are a multiple of so many rows: llama.cpp keeps the graph of a step for one alike."""

WORTH_A_TILE = 24
"""Where so many tokens fit, a whole tile is taken: it takes little longer than they and as many again would."""

_FIRST_CHUNK = 32
_WEIGHT = 0.2  # of the newest measurement in the moving averages
_CLOCK_TICK_S = 1e-6  # no step takes less


class StepCost:
    """A cost model of one context: a step takes the decode rows' time plus so much for each prompt token.

    A prompt token costs more the more tokens are before it, so its price is a line over its position.

    Args:
        target_s: How long a step may take beside running streams.
        lone_s: How long beside none.
        max_rows: Most rows in a step.
    """

    def __init__(self, target_s: float, max_rows: int, *, lone_s: float) -> None:
        self._target_s = target_s
        self._lone_s = lone_s
        self._max_rows = max_rows
        self._decode_s: dict[int, float] = {}  # rows -> seconds of a step with nothing else
        self._token_s = _Line()  # position -> seconds a prompt token adds

    def prefill_budget(self, decode_rows: int, position: int = 0, beside: Beside = ALONE) -> int:
        """Prompt tokens for a step beside so many running streams.

        Where the streams alone take more than half of the target, prefill gets as much time as they do: the pace of the
        streams halves at worst, and a prompt does not starve on a slow machine.

        Args:
            decode_rows: The streams in the same step.
            position: Of the first token that will be prefilled, in its prompt.
            beside: What takes its turn with the step; its prompts share the time that is left with this one's.
        """
        if not self._token_s.known:
            return min(_FIRST_CHUNK, self._max_rows)
        target_s = self._target_s if decode_rows or beside.streams else self._lone_s
        streams_s = self._decode_time(decode_rows) + beside.streams_s
        left_s = max(target_s - streams_s, streams_s) / (1 + beside.prompts)
        tokens = max(MIN_CHUNK, int(left_s / self._token_s.at(position)))
        if tokens >= WORTH_A_TILE:
            tokens = max(TILE, tokens // GRAIN * GRAIN)
        return min(tokens, self._max_rows)

    def observe(self, *, decode_rows: int, prefill_tokens: int, seconds: float, position: int = 0) -> None:
        """Learn from a step that was just made, whose first prompt token was at ``position``."""
        if prefill_tokens == 0:
            known = self._decode_s.get(decode_rows, seconds)
            self._decode_s[decode_rows] = known + _WEIGHT * (seconds - known)
            return
        rest_s = max(seconds - self._decode_time(decode_rows), seconds / 10, _CLOCK_TICK_S)
        self._token_s.add(position, rest_s / prefill_tokens)

    def _decode_time(self, rows: int) -> float:
        if rows == 0 or not self._decode_s:
            return 0.0
        nearest = min(self._decode_s, key=lambda known: abs(known - rows))
        return self._decode_s[nearest]


class _Line:
    """The straight line through points, by least squares; each new one makes all earlier ones count less."""

    def __init__(self) -> None:
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    @property
    def known(self) -> bool:
        return self._n > 0

    def add(self, x: float, y: float) -> None:
        keep = 1 - _WEIGHT
        self._n = keep * self._n + 1
        self._x = keep * self._x + x
        self._y = keep * self._y + y
        self._xx = keep * self._xx + x * x
        self._xy = keep * self._xy + x * y

    def at(self, x: float) -> float:
        """Its height there, that of a line which does not fall; at least half of the mean, wherever that is."""
        mean_x, mean_y = self._x / self._n, self._y / self._n
        spread = self._xx / self._n - mean_x**2
        slope = max(0.0, (self._xy / self._n - mean_x * mean_y) / spread) if spread > 1 else 0.0
        return max(mean_y + slope * (x - mean_x), mean_y / 2)
