"""The formulae of the benchmark. Pure: no clock, no socket. `docs/benchmarks.md` says the same in words."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Metrics = dict[str, float]
"""One run of one scenario on one server: values by name, units in the names."""


@dataclass(frozen=True)
class Sample:
    """One request as the client saw it. Times are seconds of one clock.

    Attributes:
        sent_s: Before the first byte of the request was written.
        token_s: Arrival of each token event; events that came in one read have the same time.
        tokens: Output tokens by the server's own count, or the number of token events if the stream was not read to
            its end or the server does not say.
    """

    sent_s: float
    token_s: tuple[float, ...]
    tokens: int

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        return self.token_s[0] - self.sent_s

    @property
    def gaps_s(self) -> list[float]:
        """Inter-token latencies."""
        return [after - before for before, after in zip(self.token_s, self.token_s[1:], strict=False)]


@dataclass(frozen=True)
class Ratio:
    """A paired ratio, ours / theirs: the median of the pairs' ratios and its spread, the least and the greatest."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Target:
    """What is to be reached.

    Attributes:
        metric: Name in `Metrics`.
        bound: ``at least`` or ``at most`` this.
        of: The ratio orchd / peer, or orchd's own value.
        peer: Beside which server.
        model: Only with files whose name ends so; any, if it is empty.
    """

    metric: str
    direction: Literal["at least", "at most"]
    bound: float
    of: Literal["ratio", "value"] = "ratio"
    peer: str = "llama-server"
    model: str = ""

    def met_by(self, value: float) -> bool:
        """Whether a value passes. NaN never does."""
        return value >= self.bound if self.direction == "at least" else value <= self.bound

    def __str__(self) -> str:
        return f"{'≥' if self.direction == 'at least' else '≤'} {self.bound:g}"


def percentile(values: Iterable[float], percent: float) -> float:
    """The nearest-rank percentile: the least value such that `percent` % of all are not above it.

    Raises:
        ValueError: No values, or not 0 < percent <= 100.
    """
    ordered = sorted(values)
    if not ordered or not 0 < percent <= 100:
        raise ValueError(f"percentile {percent:g} of {len(ordered)} values; there must be one, and 0 < percent <= 100")
    return ordered[math.ceil(percent * len(ordered) / 100) - 1]


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio | None:
    """The ratio within each pair, over the pairs; None where one of theirs is 0."""
    if not ours or len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} values of ours and {len(theirs)} of theirs are no pairs")
    if 0 in theirs:
        return None
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def summarise(samples: Sequence[Sample]) -> Metrics:
    """Rates and latencies of a load that ran until its last request was answered.

    tokens/s and requests/s are over the time from the first request sent to the last token received.
    """
    took_s = max(sample.token_s[-1] for sample in samples) - min(sample.sent_s for sample in samples)
    return {
        "tokens_per_s": sum(sample.tokens for sample in samples) / took_s,
        "requests_per_s": len(samples) / took_s,
        **latencies(samples),
    }


def latencies(samples: Sequence[Sample]) -> Metrics:
    """TTFT over the requests, inter-token latency over all gaps of all requests; milliseconds."""
    ttft = [sample.ttft_s * 1e3 for sample in samples]
    gaps = [gap * 1e3 for sample in samples for gap in sample.gaps_s]
    metrics = {"ttft_p50_ms": percentile(ttft, 50), "ttft_p99_ms": percentile(ttft, 99)}
    if gaps:
        metrics |= {"itl_p50_ms": percentile(gaps, 50), "itl_p99_ms": percentile(gaps, 99), "itl_max_ms": max(gaps)}
    return metrics


def within(sample: Sample, start_s: float, end_s: float) -> Sample:
    """What of a request lies between two moments, its tokens counted by their events."""
    times = tuple(time for time in sample.token_s if start_s <= time <= end_s)
    return Sample(sample.sent_s, times, len(times))
