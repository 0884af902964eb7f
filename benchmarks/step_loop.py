"""What the server costs: eight streams through HTTP against a bare step loop over the same slots, in one process run.

    python -m benchmarks.step_loop [--pairs 5] [--tokens 128] [--slots 8] [--json FILE]

Both sides are the same engine with the same model, prompts and greedy sampling; the loop has no queue, no threads and
no HTTP around it. They take turns, so that a noisy machine is noisy for both. The figure is tokens per second through
HTTP / tokens per second of the loop, the median over the pairs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from engines.api import DeviceSpec, LoadedModel, ModelSpec, SamplingParams, Sequence, Vocab
from engines.llamacpp.engine import LlamaCppEngine
from orchd.client import Client, End
from orchd.machine.cores import usable_cores
from orchd.machine.devices import Device
from orchd.models.references import demo_model_path
from orchd.observer import Summary
from orchd.process import listen
from orchd.server import Server
from orchd.settings.config import Config, PoolConfig, ServerConfig
from orchd.settings.credentials import Credentials

TOKEN = "one-token-for-one-benchmark"
PROMPTS = [f"Here are some facts about the number {n}:" for n in range(1, 257)]


class _Ready:
    """An `orchd.observer.Observer` that only tells when the server is ready."""

    def __init__(self) -> None:
        self.summary: asyncio.Future[Summary] = asyncio.get_running_loop().create_future()

    def loading(self, label: str, share: float) -> None: ...

    def loaded(self, label: str, seconds: float) -> None: ...

    def ready(self, summary: Summary) -> None:
        self.summary.set_result(summary)

    def stopping(self, running: int) -> None: ...

    def stopped(self) -> None: ...


def loop_rate(model: LoadedModel, vocab: Vocab, prompts: list[str], tokens: int) -> float:
    """Tokens per second of a bare step loop."""
    began = time.perf_counter()
    for number, prompt in enumerate(prompts):
        sampling = SamplingParams(temperature=0, ignore_eos=True)
        model.admit(Sequence(str(number), vocab.tokenize(prompt), tokens, sampling=sampling))
    made = 0
    while model.busy:
        made += len(model.step())
    return made / (time.perf_counter() - began)


async def http_rate(client: Client, prompts: list[str], tokens: int) -> float:
    """Tokens per second of as many streams at once through HTTP."""

    async def stream(prompt: str) -> int:
        task = await client.submit(prompt=prompt, max_tokens=tokens, temperature=0, ignore_eos=True)
        made = 0
        async for event in client.follow(task.task_id):
            if isinstance(event, End):
                made = event.tokens_out
        return made

    began = time.perf_counter()
    made = sum(await asyncio.gather(*map(stream, prompts)))
    return made / (time.perf_counter() - began)


@asynccontextmanager
async def served(spec: ModelSpec, threads: int) -> AsyncIterator[Client]:
    """A real server in this process, and a client of it."""
    config = Config(
        server=ServerConfig(port=0), pools=(PoolConfig(model=str(spec.path), slots=spec.slots, ctx=spec.ctx),)
    )
    observer = _Ready()
    device = Device("cpu", DeviceSpec("cpu", threads=threads))
    server = Server(config, Credentials(TOKEN, "benchmark"), LlamaCppEngine(), [[device]], observer)
    stop = asyncio.Event()
    running = asyncio.create_task(server.run([spec.path], listen("127.0.0.1", 0), stop=stop))
    summary = await observer.summary
    async with Client(summary.url, token=TOKEN) as client:
        yield client
    stop.set()
    await running


async def measure(spec: ModelSpec, *, pairs: int, tokens: int) -> list[tuple[float, float]]:
    """Pairs of (loop, HTTP) rates, after one unmeasured pair."""
    threads = usable_cores()
    engine = LlamaCppEngine()
    vocab = engine.load_vocab(spec.path)
    model = engine.load(spec, DeviceSpec("cpu", threads=threads))
    results = []
    async with served(spec, threads) as client:
        for pair in range(pairs + 1):
            first = (2 * pair * spec.slots) % len(PROMPTS)
            prompts = (PROMPTS + PROMPTS)[first : first + 2 * spec.slots]
            loop = loop_rate(model, vocab, prompts[: spec.slots], tokens)
            http = await http_rate(client, prompts[spec.slots :], tokens)
            if pair:
                results.append((loop, http))
    model.close()
    vocab.close()
    return results


def main() -> None:
    """Run and print one row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=demo_model_path())
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.model is None:
        parser.error("the demo model is not installed; run 'make setup', or give --model FILE")
    spec = ModelSpec(options.model, slots=options.slots, ctx=1024)
    results = asyncio.run(measure(spec, pairs=options.pairs, tokens=options.tokens))
    loop, http = (statistics.median(side) for side in zip(*results, strict=True))
    ratios = sorted(there / here for here, there in results)
    print(f"model {options.model.name}, {options.slots} streams of {options.tokens} tokens, {options.pairs} pairs")
    print(f"step loop {loop:7.1f} tokens/s")
    print(f"HTTP      {http:7.1f} tokens/s")
    print(f"ratio     {statistics.median(ratios):7.3f}  (from {ratios[0]:.3f} to {ratios[-1]:.3f}; target 0.9)")
    if options.json is not None:
        options.json.write_text(json.dumps({"tokens_per_s": results, "ratio": statistics.median(ratios)}, indent=1))


if __name__ == "__main__":
    main()
