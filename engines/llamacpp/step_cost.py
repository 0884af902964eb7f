"""How many prompt tokens fit into a step, learnt from the steps themselves.

The streams in a step wait for the prompt tokens in it. Too many of them, and the streams stutter; too few, and the
prompt never ends on a slow machine. So the time left of a target is divided by the measured price of a prompt token.

For example, with a target of 100 ms beside watched streams, 500 ms beside none, and 1 ms for each prompt token:
- four streams take 20 ms: 80 tokens fit, and 20 are a light chunk, which makes the step twice as long;
- they take 60 ms: 60 tokens fit, not 40, because a prompt always gets at least as much time as the streams;
- they take 20 ms and another model on the device also reads a prompt: 40 tokens, as both share the 80 ms;
- no client waits for the four streams' next token: 480 tokens fit, and 25, a quarter of the target, are light;
- nothing was measured yet: `MIN_CHUNK` tokens, whose step is the first measurement;
- a step takes 400 ms however few tokens it has: see `least_chunk`.
"""

from __future__ import annotations

from engines.api import ALONE, Beside
from engines.llamacpp.batch import MIN_CHUNK, Budget
from engines.llamacpp.least_chunk import LeastChunk

_WEIGHT = 0.2  # of the newest measurement in the moving averages
_CLOCK_TICK_S = 1e-6  # no step takes less


class StepCost:
    """A cost model of one context: a step takes the time of its decode rows, plus a price for each prompt token.

    A prompt token costs more the more tokens precede it, so its price is a straight line over its position.

    Args:
        target_s: How long a step may take while a watched stream is running.
        lone_s: How long it may take otherwise.
        max_rows: Most rows in a step.
    """

    def __init__(self, target_s: float, max_rows: int, *, lone_s: float) -> None:
        self._target_s = target_s
        self._lone_s = lone_s
        self._max_rows = max_rows
        self._decode_s: dict[int, float] = {}  # rows -> seconds of a step with nothing else
        self._token_s = _Line()  # position -> seconds a prompt token adds
        self._least = LeastChunk()

    def budget(
        self, decode_rows: int, position: int = 0, beside: Beside = ALONE, *, watched: bool, spent_s: float = 0.0
    ) -> Budget:
        """Prompt tokens for a step that also decodes ``decode_rows`` streams.

        If the streams alone take more than half of the target, prefill gets as much time as they do: the streams run at
        half speed at worst, and a prompt does not starve on a slow machine. A light chunk takes as long as the streams,
        or a quarter of the target if no stream is watched.

        Args:
            decode_rows: The streams in the same step.
            position: Of the first token that will be prefilled, in its prompt.
            beside: What other models on the device do between steps; their prompts share the remaining time.
            watched: Whether a client waits for the next token of a stream in the step. If not, only the streams of
                other models set the pace.
            spent_s: Seconds of the target that copies took since the last step.
        """
        watched = watched or beside.streams > 0
        if not self._token_s.known:
            careful = min(MIN_CHUNK, self._max_rows)
            return Budget(careful, careful, watched)
        streams_s = self._decode_time(decode_rows) + beside.streams_s
        target_s = (self._target_s if watched else self._lone_s) - spent_s
        left_s = max(target_s - streams_s, streams_s) / (1 + beside.prompts)
        light_s = streams_s if watched else self._target_s / 4
        fit, light = (self._tokens(seconds, position) for seconds in (left_s, min(light_s, left_s)))
        size = min(self._least.size(fit), self._max_rows)
        return Budget(size, light, watched, overdrawn=size > fit)

    def limit_s(self, beside: Beside = ALONE, *, watched: bool) -> float:
        """Seconds that a step may take; see `budget`."""
        return (self._target_s if watched or beside.streams > 0 else self._lone_s) - beside.streams_s

    def plain_s(self, streams: int) -> float | None:
        """Seconds of a step with one row of so many streams, and nothing else; None before the first of them."""
        return self._decode_s.get(streams)

    def token_s(self, position: int = 0) -> float | None:
        """Seconds for a prompt token at this position; None before the first measurement."""
        return self._token_s.at(position) if self._token_s.known else None

    def stream_s(self) -> float | None:
        """Seconds for a pass over a stream's row: the shortest step without a prompt; None before the first."""
        return min(self._decode_s.values(), default=None)

    def expected_s(self, *, decode_rows: int, prefill_tokens: int, position: int) -> float | None:
        """Seconds that a step should take; None if too little has been measured."""
        token_s = self.token_s(position) if prefill_tokens else 0.0
        if token_s is None or (decode_rows and not self._decode_s):
            return None
        return self._decode_time(decode_rows) + prefill_tokens * token_s

    def observe(self, *, decode_rows: int, prefill_tokens: int, seconds: float, position: int = 0) -> None:
        """Learn from a step that was just made, whose first prompt token was at ``position``."""
        if prefill_tokens == 0:
            self._least.rest()
            known = self._decode_s.get(decode_rows, seconds)
            self._decode_s[decode_rows] = known + _WEIGHT * (seconds - known)
            return
        rest_s = max(seconds - self._decode_time(decode_rows), seconds / 10, _CLOCK_TICK_S)
        self._least.observe(prefill_tokens, rest_s)
        self._token_s.add(position, rest_s / prefill_tokens)

    def _tokens(self, seconds: float, position: int) -> int:
        return min(max(MIN_CHUNK, int(seconds / self._token_s.at(position))), self._max_rows)

    def _decode_time(self, rows: int) -> float:
        if rows == 0 or not self._decode_s:
            return 0.0
        nearest = min(self._decode_s, key=lambda known: abs(known - rows))
        return self._decode_s[nearest]


class _Line:
    """A straight line through points, by least squares; each new point reduces the weight of the earlier ones."""

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
        """The line's value there. It never falls, and is never below half of the mean."""
        mean_x, mean_y = self._x / self._n, self._y / self._n
        spread = self._xx / self._n - mean_x**2
        slope = max(0.0, (self._xy / self._n - mean_x * mean_y) / spread) if spread > 1 else 0.0
        return max(mean_y + slope * (x - mean_x), mean_y / 2)
