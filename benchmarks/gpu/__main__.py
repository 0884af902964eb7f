"""Measure orchd on a GPU beside llama-bench and llama-server of the same build.

    python -m benchmarks.gpu [--device gpu:0] [--quick] [--model FILE ...] [--json FILE]

For each model, one stream: tokens/s against llama-bench, and the share of the memory's bandwidth that it reaches; many
streams: tokens/s against llama-server; and how long a worker's thread keeps the GPU waiting at 32 slots. Nothing is
fetched. With ``--device cpu`` everything runs on the CPU, to see that it runs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import gguf

from benchmarks.compare import load, setup
from benchmarks.compare.drivers import Driver, LlamaServer, Orchd, Setup
from benchmarks.compare.prompts import Prompts
from benchmarks.compare.servers import serving
from benchmarks.compare.stats import summarise
from benchmarks.compare.workloads import Work, warm_up
from benchmarks.gpu.card import Card, look_at
from benchmarks.gpu.models import write_named
from engines.llamacpp.build import gpu_backend
from orchd.machine.cores import usable_cores
from orchd.machine.devices import gpu_index
from orchd.models.references import demo_model_path

CLIENTS = (1, 8, 32)
PROMPT_TOKENS = 32
OF_LLAMA_BENCH = 0.97
OF_LLAMA_SERVER = 1.2
OUTSIDE = 0.05


class OrchdOn(Orchd):
    """On one device."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self._device = device

    def command(self, setup: Setup, folder: Path, port: int) -> list[str]:
        command = super().command(setup, folder, port)
        with (folder / "orchd.toml").open("a") as config:
            config.write(f"devices = [{json.dumps(self._device)}]\n")  # of the pool, which comes last
        return command


class LlamaServerOn(LlamaServer):
    """All layers on one GPU, as orchd has them; or none."""

    def __init__(self, binaries: Path, device: str) -> None:
        super().__init__(binaries)
        self._device = device

    def command(self, setup: Setup, folder: Path, port: int) -> list[str]:
        return [*super().command(setup, folder, port), *offload(self._device)]


def offload(device: str) -> list[str]:
    """The options of llama.cpp's programs for a device."""
    index = gpu_index(device)
    if index is None:
        return ["-ngl", "0"]
    return ["-ngl", "999", "-sm", "none", "-mg", str(index)]


@dataclass
class Row:
    """What was measured with one model.

    Attributes:
        weights_bytes: What each token has to read of it.
        bench: Tokens/s of llama-bench, one stream.
        ours: Tokens/s of orchd by the number of clients, one for each pair.
        theirs: Tokens/s of llama-server.
        outside: Share of a worker's round outside ``llama_decode``, at as many slots as it has clients at most.
    """

    model: str
    weights_bytes: int
    bench: list[float] = field(default_factory=list)
    ours: dict[int, list[float]] = field(default_factory=dict)
    theirs: dict[int, list[float]] = field(default_factory=dict)
    outside: float = 0.0

    def verdicts(self, card: Card) -> Iterator[tuple[str, bool | None]]:
        """Lines to print, and whether a goal is met; None for what has none."""
        most = max(self.ours)
        one, bench = statistics.median(self.ours[1]), statistics.median(self.bench)
        yield (
            f"1 stream: {one:8.1f} tokens/s, llama-bench {bench:8.1f}: {one / bench:.3f}",
            one / bench >= OF_LLAMA_BENCH,
        )
        if card.bandwidth:
            share = self.weights_bytes * one / card.bandwidth
            yield f"1 stream: {share:.1%} of the memory's bandwidth ({card.bandwidth / 1e9:.0f} GB/s)", None
        for clients, ours in self.ours.items():
            here, there = statistics.median(ours), statistics.median(self.theirs[clients])
            goal = here / there >= OF_LLAMA_SERVER if clients == most else None
            yield f"{clients} streams: {here:8.1f} tokens/s, llama-server {there:8.1f}: {here / there:.3f}", goal
        yield f"{most} slots: {self.outside:.1%} of a round outside llama_decode", self.outside <= OUTSIDE


def weights_bytes(model: Path) -> int:
    """Bytes of weights that a token reads: all tensors but the table of embeddings, of which it needs one row."""
    tensors = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(model).tensors}
    if "output.weight" in tensors:  # otherwise the table is the output matrix as well
        tensors.pop("token_embd.weight")
    return sum(tensors.values())


def bench_rate(binaries: Path, model: Path, device: str, *, tokens: int, threads: int) -> float:
    """Tokens/s of ``llama-bench``: one sequence, nothing around it."""
    command = [str(binaries / "llama-bench"), "-m", str(model), "-p", "0", "-n", str(tokens), "-r", "1", "-o", "json"]
    command += ["-t", str(threads), "-fa", "auto" if _takes_auto(binaries) else "1", *offload(device)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise setup.SetupError(f"llama-bench ended with {done.returncode}: {done.stderr[-500:]}")
    return float(json.loads(done.stdout)[0]["avg_ts"])


def _takes_auto(binaries: Path) -> bool:
    done = subprocess.run([str(binaries / "llama-bench"), "--help"], capture_output=True, text=True, check=False)
    flash = next((line for line in done.stdout.splitlines() if "--flash-attn" in line), "")
    return "auto" in flash


async def rate(driver: Driver, held: Setup, *, clients: int, pair: int, quick: bool) -> float:
    """Tokens/s of a server under so many streams at once."""
    async with serving(driver, held) as server:
        work = Work(Prompts(held.model, f"{clients}/{pair}"), f"{clients}/{pair}", quick=quick)
        await warm_up(server, work)
        tokens, each = (64, 1) if quick else (256, 2)
        samples = await load.closed_loop(server, work.tasks(clients, each, PROMPT_TOKENS, tokens))
        return summarise(samples)["tokens_per_s"]


def outside_decode(model: Path, device: str, *, slots: int, steps: int) -> float:
    """`share_outside_decode` in a process of its own: this one never loads llama.cpp."""
    command = [sys.executable, "-m", "benchmarks.gpu.worker_share", str(model), "--device", device, "--json"]
    command += ["--slots", str(slots), "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise setup.SetupError(f"the worker's share could not be measured: {done.stderr[-500:]}")
    return float(json.loads(done.stdout)["outside"])


def the_models(options: argparse.Namespace) -> list[Path]:
    """The demo model and the synthetic ones, written if they are not there."""
    if options.model:
        return list(options.model)
    demo = demo_model_path()
    if demo is None:
        raise setup.SetupError("the demo model is not installed; run 'make setup', or give --model FILE")
    setup.CACHE.mkdir(parents=True, exist_ok=True)
    kinds = () if options.device == "cpu" else ("Q4_K", "Q8_0")
    return [demo, *(write_named(setup.CACHE, f"8B-{kind}") for kind in kinds)]


async def measure(row: Row, model: Path, binaries: Path, options: argparse.Namespace, save: Callable[[], None]) -> None:
    """All of one model, the servers taking turns; every figure is saved when it is known."""
    pairs = options.pairs or (1 if options.quick else 3)
    tokens, ctx = (64, 512) if options.quick else (256, 1024)
    for pair in range(pairs):
        row.bench.append(bench_rate(binaries, model, options.device, tokens=tokens, threads=options.threads))
        print(f"  {model.name} llama-bench, 1 stream: {row.bench[-1]:.1f} tokens/s", flush=True)
        for clients in options.clients:
            held = Setup(model, slots=clients, ctx=ctx, threads=options.threads)
            sides: list[tuple[Driver, dict[int, list[float]]]] = [
                (OrchdOn(options.device), row.ours),
                (LlamaServerOn(binaries, options.device), row.theirs),
            ]
            for driver, figures in sides if pair % 2 == 0 else sides[::-1]:
                found = await rate(driver, held, clients=clients, pair=pair, quick=options.quick)
                figures.setdefault(clients, []).append(found)
                print(f"  {model.name} {driver.name}, {clients} streams: {found:.1f} tokens/s", flush=True)
                save()
    slots, steps = max(options.clients), 20 if options.quick else 200
    row.outside = outside_decode(model, options.device, slots=slots, steps=steps)
    save()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    made.add_argument(
        "--device", default="gpu:0", metavar="gpu:N", help="which one (default: gpu:0); or cpu, to try it"
    )
    made.add_argument("--model", nargs="+", type=Path, metavar="FILE", help="instead of demo and synthetic 8B models")
    made.add_argument("--clients", nargs="+", type=int, default=CLIENTS, help="streams at once (default: 1 8 32)")
    made.add_argument("--pairs", type=int, help="measurements of each side (default: 3; 1 with --quick)")
    made.add_argument("--quick", action="store_true", help="short ones")
    made.add_argument("--threads", type=int, default=usable_cores(), help="of each server (default: every core)")
    made.add_argument("--peer-bin", type=Path, metavar="DIR", help="where llama-server is (default: build/peer/bin)")
    made.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line for each figure; exit with 1 if a goal is missed, 2 if nothing could be measured."""
    options = parser().parse_args(arguments)
    os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # llama.cpp's programs count GPUs as nvidia-smi does then
    if 1 not in options.clients:
        options.clients = [1, *options.clients]
    try:
        if options.device != "cpu" and gpu_backend() is None:
            raise setup.SetupError("llama.cpp was built for the CPU only; make BACKEND=cuda setup, or try --device cpu")
        card = look_at(options.device)
        binaries = setup.peer_binaries(options.peer_bin)
        models = the_models(options)
        rows = [Row(model.name, weights_bytes(model)) for model in models]

        def save() -> None:
            if options.json is not None:
                found = {"card": vars(card), "facts": setup.facts(), "rows": [vars(row) for row in rows]}
                options.json.write_text(json.dumps(found, indent=1) + "\n")

        for row, model in zip(rows, models, strict=True):
            asyncio.run(measure(row, model, binaries, options, save))
    except setup.SetupError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    met = True
    print(f"\n{card.name}")
    for row in rows:
        print(f"{row.model}: {row.weights_bytes / 2**30:.2f} GiB of weights a token")
        for line, goal in row.verdicts(card):
            met = met and goal is not False
            print(f"  {'     ' if goal is None else 'goal ' if goal else 'MISS '}{line}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
