"""How many guessed tokens are worth checking in the next step.

A step reads all weights for one token of each stream. A guess that is right makes it two for one more row, and a wrong
one costs the row. So it is known of each stream how often its guesses are right, by how much of its text agreed before
them: that is counted at every token, whether its guess was checked or not, and costs no step. What rows cost is known
from steps (`guess_cost`). Of all numbers of guesses, that one is taken which gives most tokens a second: mostly 0.

For example, a step takes 9 ms, and 29 ms with 7 guesses besides:
- 95 of 100 guesses are right: 7 of them make 5.7 more tokens, 230 instead of 111 tokens a second;
- 60 of 100 are: 1.5 more, 85 tokens a second, so that nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from engines.api import Beside
from engines.llamacpp.guess_cost import GuessCost
from engines.llamacpp.guesser import Guesser, Shares
from engines.llamacpp.lookup import Lookup
from engines.llamacpp.slots import Run
from engines.llamacpp.step_cost import StepCost

DEPTHS = (1, 3, 7, 15)
"""Numbers of guesses, few so that llama.cpp can use the graph of the step before again; on a CPU, it computes four rows
at a time."""

AT_FIRST = 3
"""Most guesses of a stream before a step with guesses was measured: a row may cost more than its share of a prompt."""

MARGIN = 1.05
"""How many times as many tokens a second guesses must promise, because what they cost is an estimate."""


class Depth(NamedTuple):
    """How far to guess in the next step.

    Attributes:
        guesses: For each stream that guesses.
        streams: Which ones, by their place in the arguments.
    """

    guesses: int
    streams: tuple[int, ...]


NOTHING = Depth(0, ())


def choose(
    promises: Sequence[Sequence[float]], seconds: Callable[[int, int], float], *, limit_s: float, most_rows: int
) -> Depth:
    """How far to guess, for most tokens a second.

    Args:
        promises: For each stream, see `Guesser.promise`; as many as it may guess.
        seconds: What a step takes in which so many streams guess so many tokens each.
        limit_s: What it may take at most.
        most_rows: Guesses in it, at most.
    """
    plain = len(promises) / seconds(0, 0)
    best, most = NOTHING, plain * MARGIN
    for guesses in DEPTHS:
        order = [stream for stream, promise in enumerate(promises) if len(promise) >= guesses]
        order.sort(key=lambda stream: promises[stream][guesses - 1], reverse=True)
        tokens = float(len(promises))
        for count, stream in enumerate(order[: most_rows // guesses], 1):
            tokens += promises[stream][guesses - 1]
            took_s = seconds(count, guesses)
            if took_s <= limit_s and tokens / took_s > most:
                best, most = Depth(guesses, tuple(order[:count])), tokens / took_s
    return best


class Speculation:
    """The guesses of one model's streams.

    Args:
        cost: Of steps.
        most_rows: Guesses in a step, at most.
    """

    def __init__(self, cost: StepCost, *, most_rows: int) -> None:
        self._steps = cost
        self._most_rows = most_rows
        self._cost = GuessCost()
        self._shares = Shares()

    def guesser(self, prompt: Sequence[int]) -> Guesser:
        """For a sequence that begins with this prompt."""
        return Guesser(Lookup(prompt), self._shares)

    def guess(self, streams: Sequence[Run], beside: Beside, *, watched: bool) -> Depth:
        """Give the streams of the next step their guesses; all that run are among them."""
        count = len(streams)
        plain_s = self._steps.plain_s(count)
        if plain_s is None or self._cost.is_plain_due(count):
            return NOTHING
        most = DEPTHS[-1] if self._cost.is_known else AT_FIRST
        promises = [_promise(run, most) for run in streams]
        if not any(promises):
            return NOTHING
        row_s = self._steps.token_s() or plain_s / 4

        def seconds(guessing: int, guesses: int) -> float:
            if not guesses:
                return plain_s
            return self._cost.seconds(count, guessing, guesses, plain_s=plain_s, row_s=row_s)

        limit_s = self._steps.limit_s(beside, watched=watched)
        depth = choose(promises, seconds, limit_s=limit_s, most_rows=self._most_rows)
        for stream in depth.streams:
            streams[stream].guess = _guess(streams[stream], depth.guesses)
        return depth

    def observe(self, streams: int, depth: Depth, seconds: float) -> None:
        """Learn from a step of nothing but streams."""
        plain_s = self._steps.plain_s(streams)
        if not depth.guesses:
            self._cost.plain(streams)
        elif plain_s is not None:
            guessing = len(depth.streams)
            self._cost.observe(streams, guessing, depth.guesses, plain_s=plain_s, seconds=seconds)


def _promise(run: Run, most: int) -> Sequence[float]:
    """What guesses promise a stream, for as many as it has room for: a token follows from the last."""
    most = min(most, run.sequence.max_tokens - run.tokens_out - 1)
    if forced := run.forced[:most]:
        return range(1, len(forced) + 1)
    return run.guesser.promise(most) if run.guesser is not None else ()


def _guess(run: Run, guesses: int) -> Sequence[int]:
    if forced := run.forced[:guesses]:
        return forced
    return run.guesser.guess(guesses) if run.guesser is not None else ()
