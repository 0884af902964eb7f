"""The disconnect storm: ``python -m tests.soak.storm``. Many clients connect and vanish while a few good ones stream.

The good ones are read in this process, the storm comes from another, so that its work is not measured as the server's.
A step costs more the longer its streams have grown, so that gaps grow without any storm too, those of the tiny model to
the double in ten seconds: quiet is before the storm and after it.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from orchd.models.references import demo_model_path
from testkit.harness import until
from testkit.process import TOKEN, orchd_serve
from testkit.tiny_gguf import write_tiny_llama

GOOD = 8
GRACE_S = 1.0
BEARER = {"Authorization": f"Bearer {TOKEN}"}
_CONFIG = """
[queue]
capacity = {capacity}
[tasks]
cancel_grace_s = {grace}
[[pools]]
devices = ["cpu"]
slots = {slots}
"""
_TINY = """
model = "tiny.gguf"
ctx = 32768
batch = 64
threads = 1
"""
"""Steps of a fraction of a millisecond: the serving path alone, at full speed."""
_DEMO = """
model = {model}
ctx = 2048
"""
"""A real model: steps of some ten milliseconds on two cores."""


@dataclass(frozen=True)
class Report:
    """What came of it.

    Attributes:
        vanished: Clients of the storm.
        before_ms: p99 of the gaps between a good client's reads, before the storm.
        storm_ms: The same from the first storm client on, until all their tasks were gone.
        after_ms: The same after that.
        cleared_s: From the last hang-up until nothing of the storm waited or ran.
        ends: Finish reasons of the storm's tasks.
    """

    vanished: int
    before_ms: float
    storm_ms: float
    after_ms: float
    cleared_s: float
    ends: Counter[str]

    @property
    def quiet_ms(self) -> float:
        """What the gap would have been at the storm's time without it."""
        return (self.before_ms + self.after_ms) / 2

    @property
    def line(self) -> str:
        return (
            f"{self.vanished} clients vanished beside {GOOD} good streams: p99 gap {self.before_ms:.1f} ms before, "
            f"{self.storm_ms:.1f} ms in the storm, {self.after_ms:.1f} ms after it "
            f"({self.storm_ms / self.quiet_ms:.2f} times the quiet one); all gone "
            f"{self.cleared_s:.2f} s after the last hang-up (grace {GRACE_S:g} s); ends: {dict(self.ends)}"
        )


async def storm(
    home: Path, *, clients: int = 500, spread_s: float = 5.0, quiet_s: float = 4.0, demo: bool = False
) -> Report:
    """Serve the tiny model, or the demo model, and measure; the storm's clients come evenly over ``spread_s``."""
    write_tiny_llama(home / "tiny.gguf", n_ctx_train=65536)
    config = _CONFIG.format(capacity=clients + GOOD, grace=GRACE_S, slots=GOOD + 2)
    config += _DEMO.format(model=json.dumps(str(demo_model_path()))) if demo else _TINY
    (home / "orchd.toml").write_text(config)
    with orchd_serve("--port", "0", home=home) as process:
        port = await asyncio.to_thread(process.wait_ready)
        timeout = aiohttp.ClientTimeout(total=120)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
            return await _measure(
                f"http://127.0.0.1:{port}",
                port,
                session,
                clients=clients,
                spread_s=spread_s,
                quiet_s=quiet_s,
                max_tokens=1500 if demo else 32_000,
            )


async def _measure(
    url: str,
    port: int,
    session: aiohttp.ClientSession,
    *,
    clients: int,
    spread_s: float,
    quiet_s: float,
    max_tokens: int,
) -> Report:
    reads: list[list[float]] = [[] for _ in range(GOOD)]
    with multiprocessing.get_context("spawn").Pool(1) as vanish:
        await asyncio.to_thread(
            vanish.apply, run_storm, (port, 1, 0, max_tokens)
        )  # its imports take a core for a second
        good = [asyncio.create_task(_read(url, session, times, max_tokens)) for times in reads]
        await until(lambda: all(reads), "every good client reads")
        began = time.monotonic()
        await asyncio.sleep(quiet_s)
        rages = time.monotonic()
        ids, hung_up = await asyncio.to_thread(vanish.apply, run_storm, (port, clients, spread_s, max_tokens))

    async def cleared() -> bool:
        return await _left(url, session) <= GOOD

    await until(cleared, "nothing of the storm is left")
    over = time.monotonic()
    await asyncio.sleep(quiet_s)
    left = time.monotonic()
    if any(task.done() for task in good):
        raise RuntimeError("a good stream ended before the measurement was over")
    ends = Counter([await _end(url, session, task_id) for task_id in ids])
    for task in good:
        task.cancel()
    before_ms, storm_ms, after_ms = (_p99_ms(reads, a, b) for a, b in itertools.pairwise((began, rages, over, left)))
    return Report(len(ids), before_ms, storm_ms, after_ms, max(0.0, over - hung_up), ends)


async def _read(url: str, session: aiohttp.ClientSession, times: list[float], max_tokens: int) -> None:
    request = {"prompt": "the river", "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    async with session.post(f"{url}/v1/tasks", json=request, headers=BEARER) as response:
        task_id = (await response.json())["task_id"]
    async with session.get(f"{url}/v1/tasks/{task_id}/stream", headers=BEARER) as response:
        async for _ in response.content.iter_any():
            times.append(time.monotonic())


async def _left(url: str, session: aiohttp.ClientSession) -> int:
    """Tasks that run or wait."""
    async with session.get(f"{url}/health", headers=BEARER) as response:
        busy = sum(replica["busy"] for pool in (await response.json())["pools"] for replica in pool["replicas"])
    async with session.get(f"{url}/metrics", headers=BEARER) as response:
        lines = (await response.text()).splitlines()
    return int(busy) + int(sum(float(line.split()[-1]) for line in lines if line.startswith("queue_depth{")))


async def _end(url: str, session: aiohttp.ClientSession, task_id: str) -> str:
    async with session.get(f"{url}/v1/tasks/{task_id}/stream", headers=BEARER) as response:
        return str(json.loads((await response.text()).rstrip().rpartition("data: ")[2])["finish_reason"])


def _p99_ms(reads: Sequence[Sequence[float]], since: float, until: float) -> float:
    gaps = sorted(b - a for times in reads for a, b in itertools.pairwise(times) if since <= b <= until)
    return 1000 * gaps[int(0.99 * len(gaps))]


def run_storm(port: int, clients: int, spread_s: float, max_tokens: int) -> tuple[list[str], float]:
    """In a process of its own: every client submits, opens its stream, hangs up; the ids, and when the last did."""
    return asyncio.run(_storm(port, clients, spread_s, max_tokens))


async def _storm(port: int, clients: int, spread_s: float, max_tokens: int) -> tuple[list[str], float]:
    ids = await asyncio.gather(*(_vanish(port, number * spread_s / clients, max_tokens) for number in range(clients)))
    return list(ids), time.monotonic()


async def _vanish(port: int, after_s: float, max_tokens: int) -> str:
    await asyncio.sleep(after_s)
    body = json.dumps({"prompt": "the", "max_tokens": max_tokens, "ignore_eos": True}).encode()
    head = f"Host: localhost\r\nAuthorization: Bearer {TOKEN}\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"POST /v1/tasks HTTP/1.1\r\n{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    await reader.readuntil(b"\r\n\r\n")
    answer: dict[str, Any] = json.loads(await reader.readuntil(b"}"))
    writer.write(f"GET /v1/tasks/{answer['task_id']}/stream HTTP/1.1\r\n{head}\r\n".encode())
    await reader.readuntil(b"\r\n\r\n")
    writer.transport.abort()
    return str(answer["task_id"])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak.storm", description=__doc__)
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--spread", type=float, default=5.0, help="seconds over which they come; 0 is all at once")
    parser.add_argument("--demo", action="store_true", help="with the demo model instead of a tiny one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        report = asyncio.run(storm(Path(home), clients=options.clients, spread_s=options.spread, demo=options.demo))
        print(report.line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
