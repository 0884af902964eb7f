"""Results as JSON, as tables, and in the docs. Every figure comes from a run; where there was none, there is none."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

from benchmarks.compare.scenarios import SCENARIOS, Scenario
from benchmarks.compare.stats import Metrics, Ratio, Target, paired_ratio

BY_NAME: Final[Mapping[str, Scenario]] = {scenario.name: scenario for scenario in SCENARIOS}
_UNITS: Final = (
    ("tokens_per_s", "tokens/s", 1),
    ("requests_per_s", "requests/s", 2),
    ("_ms", "ms", 1),
    ("_mib", "MiB", 0),
    ("_percent", "%", 2),
    ("_us_per_token", "µs/token", 1),
)
_LABELS: Final[Mapping[str, str]] = {
    "ttft_p50_ms": "TTFT p50",
    "ttft_p99_ms": "TTFT p99",
    "long_ttft_p50_ms": "long prompt's TTFT, median",
    "long_ttft_max_ms": "long prompt's TTFT, longest",
    "itl_p50_ms": "ITL p50",
    "itl_p99_ms": "ITL p99",
    "itl_max_ms": "longest gap",
    "of_free": "share of the tokens/s without a schema",
    "rss_mib": "resident memory",
    "idle_cpu_percent": "CPU while idle, of one core",
    "client_cpu_percent": "the client's own CPU, of one core",
}


@dataclass
class Row:
    """The pairs of one scenario with one model and one peer; `ours[i]` and `theirs[i]` are pair i."""

    scenario: str
    model: str
    peer: str
    ours: list[Metrics] = field(default_factory=list)
    theirs: list[Metrics] = field(default_factory=list)

    def values(self, metric: str) -> tuple[list[float], list[float]]:
        return [run[metric] for run in self.ours], [run[metric] for run in self.theirs]

    def ratio(self, metric: str) -> Ratio | None:
        return paired_ratio(*self.values(metric))

    @property
    def targets(self) -> tuple[Target, ...]:
        """What it is held against."""
        targets = BY_NAME[self.scenario].targets
        return tuple(one for one in targets if one.peer == self.peer and self.model.endswith(one.model))


@dataclass(frozen=True)
class Verdict:
    """A target and what came out."""

    row: Row
    target: Target
    value: float
    spread: str

    @property
    def met(self) -> bool:
        return self.target.met_by(self.value)

    def __str__(self) -> str:
        what = f"{self.row.scenario:14} {self.row.model:34} {label(self.target.metric):28}"
        of = f"orchd / {self.row.peer}" if self.target.of == "ratio" else "orchd"
        return f"{'pass' if self.met else 'MISS'}  {what} {self.value:8.3f} {self.target!s:7} {of} {self.spread}"


@dataclass
class Results:
    """Everything that one call of the benchmark measured."""

    facts: dict[str, str]
    rows: list[Row] = field(default_factory=list)
    sweep: dict[int, list[Metrics]] = field(default_factory=dict)
    profile: dict[str, float] = field(default_factory=dict)
    """Share of the event loop's samples by file and function; see `profile.py`."""
    skipped: list[str] = field(default_factory=list)
    """Scenarios that there was no time for."""

    def verdicts(self) -> Iterator[Verdict]:
        for row in self.rows:
            for target in row.targets:
                ratio = row.ratio(target.metric)
                ours, _ = row.values(target.metric)
                if target.of == "value":
                    yield Verdict(row, target, statistics.median(ours), f"({min(ours):.3f} to {max(ours):.3f})")
                elif ratio is not None:
                    yield Verdict(row, target, ratio.median, f"({ratio.low:.3f} to {ratio.high:.3f})")

    def write_json(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")


def read_json(path: Path) -> Results:
    """What `Results.write_json` wrote."""
    data = json.loads(path.read_text())
    sweep = {int(slots): runs for slots, runs in data["sweep"].items()}
    return Results(data["facts"], [Row(**row) for row in data["rows"]], sweep, data["profile"], data["skipped"])


def label(metric: str) -> str:
    return _LABELS.get(metric) or _unit(metric)[0]


def markdown(results: Results, command: str) -> str:
    """The tables, with the command that makes them."""
    facts = results.facts
    pairs = max((len(row.ours) for row in results.rows), default=0)
    parts = [
        f"Measured {facts['date']} on {facts['host']}; orchd {facts['orchd']}, llama.cpp {facts['llama.cpp']}, "
        f"Python {facts['python']}; medians of {pairs} pairs, the range of the pairs' ratios in brackets. "
        f"Command: `{command}`.",
        _targets_table(results),
        *(_rows_table(results, peer) for peer in dict.fromkeys(row.peer for row in results.rows)),
    ]
    if results.sweep:
        parts.append(_sweep_table(results.sweep))
    if results.profile:
        parts.append(_profile_table(results.profile))
    return "\n\n".join(part for part in parts if part)


def put_section(page: Path, name: str, text: str) -> None:
    """Replace what stands between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``.

    Raises:
        ValueError: The page has no such pair of markers.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    old = page.read_text()
    if begin not in old or end not in old:
        raise ValueError(f"{page} has no section between {begin} and {end}; put the two lines where it should stand")
    before, after = old.split(begin)[0], old.split(end)[1]
    page.write_text(f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}")


def _targets_table(results: Results) -> str:
    lines = [
        f"| {v.row.scenario} | {v.row.model} | {label(v.target.metric)}{', ratio' if v.target.of == 'ratio' else ''} "
        f"| {v.target} | {v.value:.3f} {v.spread} | {'met' if v.met else '**missed**'} |"
        for v in results.verdicts()
    ]
    return _table(("scenario", "model", "figure", "target", "result", ""), lines) if lines else ""


def _rows_table(results: Results, peer: str) -> str:
    lines = []
    for row in (row for row in results.rows if row.peer == peer):
        for metric in row.ours[0]:
            ours, theirs = row.values(metric)
            ratio = row.ratio(metric)
            unit, digits = _unit(metric)
            shown = f"{ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f})" if ratio else ""
            name = label(metric) if label(metric) == unit else f"{label(metric)}, {unit}"
            lines.append(
                f"| {row.scenario} | {row.model} | {name} | {statistics.median(ours):,.{digits}f} "
                f"| {statistics.median(theirs):,.{digits}f} | {shown} |"
            )
    return f"### Against {peer}\n\n" + _table(("scenario", "model", "figure", "orchd", peer, "orchd / peer"), lines)


def _sweep_table(sweep: Mapping[int, Sequence[Metrics]]) -> str:
    columns = {
        "tokens_per_s": "tokens/s",
        "itl_p99_ms": "ITL p99, ms",
        "loop_cpu_us_per_token": "event loop, µs of CPU per token",
        "cpu_us_per_token": "whole process, µs of CPU per token",
        "health_p50_ms": "`/health` p50, ms",
        "health_p99_ms": "`/health` p99, ms",
    }
    lines = [
        f"| {slots} | "
        + " | ".join(f"{statistics.median(run[key] for run in runs):,.{_unit(key)[1]}f}" for key in columns)
        + " |"
        for slots, runs in sorted(sweep.items())
    ]
    return "### Slots\n\n" + _table(("slots", *columns.values()), lines)


def _profile_table(profile: Mapping[str, float]) -> str:
    lines = [f"| {where} | {100 * share:.1f} % |" for where, share in profile.items()]
    return "### Where the event loop's time goes\n\n" + _table(("function", "of the loop's busy samples"), lines)


def _table(heads: Sequence[str], lines: Sequence[str]) -> str:
    return "\n".join([f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}", *lines])


def _unit(metric: str) -> tuple[str, int]:
    """Unit and digits after the point, by the end of the name."""
    return next(((unit, digits) for end, unit, digits in _UNITS if re.search(f"{end}$", metric)), (metric, 3))
