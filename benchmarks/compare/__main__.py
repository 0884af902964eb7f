"""Measure orchd beside llama-server and llama-cpp-python's own server.

python -m benchmarks.compare [--quick] [--pairs N] [--only NAME ...] [--peer NAME ...] [--json FILE] [--model FILE ...]
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path

from benchmarks.compare import setup
from benchmarks.compare.drivers import Driver, LlamaCppPython, LlamaServer, Orchd, Setup
from benchmarks.compare.profile import profile
from benchmarks.compare.prompts import Prompts
from benchmarks.compare.report import Results, Row, markdown, put_section, read_json
from benchmarks.compare.scenarios import (
    OWN,
    SCENARIOS,
    SWEEP,
    SWEEP_SLOTS,
    Scenario,
    Shape,
    Use,
    rows,
)
from benchmarks.compare.servers import serving
from benchmarks.compare.stats import Metrics
from benchmarks.compare.workloads import Work, sweep, warm_up
from orchd.machine.cores import usable_cores

PEERS = tuple(dict.fromkeys(peer for scenario in SCENARIOS for peer in scenario.peers))
NAMES = (*(scenario.name for scenario in SCENARIOS), SWEEP, "profile")
PAGE = setup.ROOT / "docs" / "benchmarks.md"
QUICK_S = 150.0
"""When the quick mode begins no further pair: what has begun then should be done within 3 minutes."""
RESULTS = setup.ROOT / "benchmarks" / "results"


def _absolute(name: str) -> Path:
    """A server runs in a folder of its own."""
    return Path(name).resolve()


def parser() -> argparse.ArgumentParser:
    names = ", ".join(NAMES)
    made = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=(__doc__ or "").splitlines()[0])
    made.add_argument("--quick", action="store_true", help="one short pair of what has a target, Q4_0 only; 3 minutes")
    made.add_argument("--pairs", type=int, help="pairs for each row (default: 5; 1 with --quick)")
    made.add_argument("--only", nargs="+", metavar="NAME", choices=NAMES, default=NAMES, help=f"of {names}")
    made.add_argument("--peer", nargs="+", metavar="NAME", choices=PEERS, default=(), help=f"of {', '.join(PEERS)}")
    made.add_argument("--model", nargs="+", type=_absolute, metavar="FILE", help="instead of the demo's two files")
    made.add_argument("--budget-s", type=float, help="begin no further pairs after so long (--quick: 150)")
    made.add_argument("--threads", type=int, default=usable_cores(), help="of each server (default: every core)")
    made.add_argument("--peer-batch", type=int, default=2048, help="llama-server's --batch-size (default: its own)")
    made.add_argument("--flash-attn", choices=("auto", "on", "off"), default="auto", help="of orchd and llama-server")
    made.add_argument("--peer-bin", type=Path, metavar="DIR", help="where llama-server is (default: build/peer/bin)")
    made.add_argument("--json", type=Path, metavar="FILE", help="write every run's figures")
    made.add_argument("--publish", action="store_true", help="write benchmarks/results/, and into docs/")
    made.add_argument("--render", type=Path, metavar="FILE", help="measure nothing; publish what --json wrote before")
    made.add_argument("--strict", action="store_true", help="exit with 1 if a target is missed")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the server under test never outlives this
    began = time.monotonic()
    try:
        results = read_json(options.render) if options.render else asyncio.run(measure(options))
    except setup.SetupError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    verdicts = list(results.verdicts())
    for line in (*verdicts, *(f"skip  {name}: out of time" for name in results.skipped)):
        print(line)
    print(f"{sum(v.met for v in verdicts)} of {len(verdicts)} targets met; {time.monotonic() - began:.0f} s")
    if options.json is not None:
        results.write_json(options.json)
    if options.publish or options.render:
        publish(results)
    return 1 if options.strict and (results.skipped or not all(v.met for v in verdicts)) else 0


async def measure(options: argparse.Namespace) -> Results:
    """Every row that was asked for, pair by pair."""
    deadline = time.monotonic() + (options.budget_s or (QUICK_S if options.quick else float("inf")))
    pairs = options.pairs or (1 if options.quick else 5)
    binaries = setup.peer_binaries(options.peer_bin)
    models = options.model or setup.demo_models(binaries, quick=options.quick)
    tiny = setup.tiny_model()
    results = Results(setup.facts())
    work: tuple[tuple[Use, list[Path]], ...] = (("real", models), ("tiny", [tiny]))
    for model, use in ((model, use) for use, files in work for model in files):
        table = [
            (scenario, Row(scenario.name, model.stem, peer))
            for scenario, peer in rows(set(options.only), quick=options.quick, use=use, peers=options.peer)
        ]
        for pair, (scenario, row) in itertools.product(range(pairs), table):
            if time.monotonic() > deadline:
                break
            held = _held(scenario.shape, model, options)
            peer = peer_named(row.peer, binaries)
            for side in _in_turn(pair):
                driver = Orchd() if side == "ours" else peer
                getattr(row, side).append(await one_run(driver, held, scenario, pair, quick=options.quick))
        results.rows += [row for _, row in table if row.ours]
        results.skipped += [f"{row.scenario} {row.model}" for _, row in table if not row.ours]
    if SWEEP in options.only and not options.quick:
        results.sweep = await measure_sweep(tiny, options.threads, pairs=min(pairs, 3))
    if "profile" in options.only and not options.quick:
        async with serving(Orchd(), Setup(tiny, slots=16, ctx=512, threads=options.threads)) as server:
            results.profile = await profile(server, Work(Prompts(tiny, "profile"), "profile", quick=False))
    return results


async def one_run(driver: Driver, held: Setup, scenario: Scenario, pair: int, *, quick: bool) -> Metrics:
    """Start a server, warm it up, run the scenario, and see it gone."""
    async with serving(driver, held) as server:
        await warm_up(server, Work(Prompts(held.model, f"warm-up {pair}"), f"warm-up {pair}", quick=quick))
        seed = f"{scenario.name} {pair}"
        figures = await scenario.run(server, Work(Prompts(held.model, seed), seed, quick=quick))
    shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
    where = f"{scenario.name:14} {held.model.stem:32} {driver.name:17} {held.slots:2} slots"
    print(f"pair {pair + 1}  {where}  {shown}", flush=True)
    return figures


async def measure_sweep(tiny: Path, threads: int, *, pairs: int) -> dict[int, list[Metrics]]:
    """orchd alone, at more and more slots."""
    figures: dict[int, list[Metrics]] = {slots: [] for slots in SWEEP_SLOTS}
    shape = Shape(slots=1, ctx=512, use="tiny")
    scenario = Scenario(SWEEP, "orchd alone", shape, sweep)
    for turn in range(pairs):
        for slots in SWEEP_SLOTS:
            held = Setup(tiny, slots=slots, ctx=shape.ctx, threads=threads)
            figures[slots].append(await one_run(Orchd(), held, scenario, turn, quick=False))
    return figures


def peer_named(name: str, binaries: Path) -> Driver:
    """What orchd is measured beside."""
    if name == LlamaCppPython.name:
        return LlamaCppPython()
    if name in OWN:
        return Orchd(name, setting=OWN[name])
    return LlamaServer(binaries, guesses=name.removeprefix("llama-server").strip())


def publish(results: Results) -> None:
    """Write the results' files, the section of the docs, and its pictures."""
    from benchmarks.compare.plots import draw

    name = f"{date.today().isoformat()}-{setup.host_class()}"
    results.write_json(RESULTS / f"{name}.json")
    text = markdown(results, results.facts["command"])
    (RESULTS / f"{name}.md").write_text(f"# {name}\n\n{text}\n")
    pictures = [f"![{path.stem}](images/{path.name})" for path in draw(results, PAGE.parent / "images")]
    put_section(PAGE, "compare", "\n\n".join([text, *pictures]))
    print(f"written: {RESULTS / name}.json, .md, and {PAGE}")


def _in_turn(pair: int) -> Iterator[str]:
    """Ours first in every other pair, so that neither side always gets the warmer machine."""
    yield from ("ours", "theirs") if pair % 2 == 0 else ("theirs", "ours")


def _held(shape: Shape, model: Path, options: argparse.Namespace) -> Setup:
    held = Setup(model, shape.slots, shape.ctx, options.threads, prompt_store=shape.prompt_store)
    return replace(held, peer_batch=options.peer_batch, flash_attn=options.flash_attn)


if __name__ == "__main__":
    sys.exit(main())
