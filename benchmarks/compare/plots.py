"""The pictures of `docs/benchmarks.md`, as SVG that is the same for the same results."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Final

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from benchmarks.compare.report import Results, label

_OURS: Final = "#1f6fb2"
_MISSED: Final = "#b2431f"


def draw(results: Results, folder: Path) -> list[Path]:
    """Write what the results allow; the files."""
    plt.rcParams.update({"svg.hashsalt": "orchd", "svg.fonttype": "none", "font.size": 9})
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {"targets": _targets(results), "sweep": _sweep(results)}
    written = []
    for name, figure in pictures.items():
        if figure is not None:
            path = folder / f"benchmark-{name}.svg"
            figure.savefig(path, format="svg", metadata={"Date": None}, bbox_inches="tight")
            plt.close(figure)
            written.append(path)
    return written


def _targets(results: Results) -> Figure | None:
    """Each ratio with its spread, as a multiple of its target: on the right side of 1 it is met."""
    verdicts = [v for v in results.verdicts() if v.target.of == "ratio"]
    if not verdicts:
        return None
    figure, axes = plt.subplots(figsize=(8, 0.32 * len(verdicts) + 1))
    for place, verdict in enumerate(reversed(verdicts)):
        ratio = verdict.row.ratio(verdict.target.metric)
        if ratio is None:
            continue
        bound, better = verdict.target.bound, verdict.target.direction == "at least"
        low, middle, high = sorted((v / bound if better else bound / v) for v in (ratio.low, ratio.median, ratio.high))
        colour = _OURS if verdict.met else _MISSED
        axes.plot([low, high], [place, place], color=colour, linewidth=2)
        axes.plot([middle], [place], "o", color=colour)
    names = [f"{v.row.scenario}, {label(v.target.metric)} {v.target} ({v.row.model})" for v in reversed(verdicts)]
    axes.set_yticks(range(len(names)), names)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("result / target for rates, target / result for times and memory: right of the line is met")
    return figure


def _sweep(results: Results) -> Figure | None:
    if not results.sweep:
        return None
    slots = sorted(results.sweep)
    figure, panels = plt.subplots(1, 3, figsize=(10, 3))
    for axes, (metric, title) in zip(
        panels,
        (
            ("tokens_per_s", "tokens/s"),
            ("loop_cpu_us_per_token", "event loop, µs of CPU per token"),
            ("health_p99_ms", "/health p99, ms"),
        ),
        strict=True,
    ):
        runs = [[run[metric] for run in results.sweep[count]] for count in slots]
        axes.plot(slots, [statistics.median(values) for values in runs], "o-", color=_OURS)
        axes.fill_between(slots, [min(v) for v in runs], [max(v) for v in runs], color=_OURS, alpha=0.2)
        axes.set_xscale("log", base=2)
        axes.set_xticks(slots, [str(count) for count in slots])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("slots and clients")
        axes.set_title(title)
    figure.tight_layout()
    return figure
