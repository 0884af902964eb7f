"""Admission under pressure: what a submit costs while thousands wait, whether back-offs are true, what a refusal costs.

    python -m benchmarks.admission [--quick] [--repeat 3] [--json FILE]

Everything goes over real HTTP to a server in a process of its own, with tiny models that are made on the spot. A figure
is the median over the repeats; what takes turns does so within one repeat, so that a noisy machine is noisy for all.

- waiting: submit latency and memory with so many tasks waiting, while 8 tasks stream;
- path: tasks per second from submit to end, 16 tokens each, 64 clients at a time;
- honesty: clients that wait as told, in bursts that are larger than the queue, in several mixes of lengths, on 1 and 8
  slots: see benchmarks/honesty.py;
- refusal: CPU time of the whole process for a 429, in turn with /health and with the same body sent to a path that is
  not there, whose bytes the server must take from the socket all the same. Its model stands still, so that all CPU
  time is that of requests.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import math
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.honesty import MIXES, measure_honesty, write_model
from benchmarks.serving import (
    HEADERS,
    Row,
    body,
    client,
    cpu_s,
    depth,
    follow,
    leave,
    pool_health,
    resident_bytes,
    serving,
    submit,
    together,
)
from orchd.machine.cores import usable_cores
from testkit.tiny_gguf import PIECES, write_tiny_llama

STREAMS = 8
CAPACITY = 16


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, math.ceil(share * len(values)) - 1)]


# --- waiting ---------------------------------------------------------------------------------------------------------


async def measure_waiting(model: Path, *, levels: Sequence[int], samples: int) -> Row:
    """Submit latency at each number of waiting tasks, in bursts of 50 that are cancelled again."""
    result: Row = {}
    burst = 50
    with serving(model, slots=STREAMS, ctx=65536, capacity=max(levels) + 2 * burst, cancel_grace_s=0) as (url, pid):
        async with client(url) as session, client(url) as streaming:
            running = [await submit(session, body(max_tokens=60_000)) for _ in range(STREAMS)]
            streams = [asyncio.create_task(follow(streaming, task_id)) for task_id in running]
            await asyncio.sleep(1)
            before, waiting = resident_bytes(pid), 0
            small = body(max_tokens=16, priority="batch")
            for level in levels:
                jobs = [lambda: submit(session, small)] * (level - waiting)
                await together(jobs, 16)
                waiting = level
                latencies: list[float] = []
                while len(latencies) < samples:
                    ids = []
                    for _ in range(burst):
                        began = time.perf_counter()
                        ids.append(await submit(session, small))
                        latencies.append(1000 * (time.perf_counter() - began))
                    await together([functools.partial(leave, session, task_id) for task_id in ids], 8)
                    while await depth(session) > level:  # noqa: ASYNC110  # another process's event
                        await asyncio.sleep(0.05)
                health = await pool_health(session)
                assert health["replicas"][0]["busy"] == STREAMS, "the streams ended before the measurement did"
                result[f"p50_ms_at_{level}"] = statistics.median(latencies)
                result[f"p99_ms_at_{level}"] = percentile(latencies, 0.99)
                if level == max(levels):
                    result["bytes_per_waiting_task"] = (resident_bytes(pid) - before) / level
            for stream in streams:
                stream.cancel()
    low, high = (100, max(levels)) if 100 in levels else (min(levels), max(levels))
    result["p99_ratio"] = result[f"p99_ms_at_{high}"] / result[f"p99_ms_at_{low}"]
    return result


# --- path ------------------------------------------------------------------------------------------------------------


async def measure_path(model: Path, *, seconds: float) -> Row:
    with serving(model, slots=STREAMS, ctx=128, capacity=128) as (url, _):
        async with client(url) as session:
            ended = 0
            until = time.perf_counter() + seconds

            async def loop() -> None:
                nonlocal ended
                while time.perf_counter() < until:
                    await follow(session, await submit(session, body(max_tokens=16)))
                    ended += 1

            await asyncio.gather(*(loop() for _ in range(64)))
            return {"tasks_per_s": ended / seconds}


# --- refusal ---------------------------------------------------------------------------------------------------------


class _Caller:
    """Sends a request in one piece, then reads the answer, over one connection."""

    def __init__(self, url: str) -> None:
        self._host = url.removeprefix("http://")
        name, _, port = self._host.rpartition(":")
        self._socket = socket.create_connection((name, int(port)))

    def request(self, method: str, path: str, data: bytes | None) -> bytes:
        headers = {"Host": self._host} | HEADERS
        if data is not None:
            headers |= {"Content-Type": "application/json", "Content-Length": str(len(data))}
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        return "\r\n".join(lines).encode() + (data or b"")

    def __call__(self, request: bytes, status: int) -> None:
        self._socket.sendall(request)
        answer = b""
        while b"\r\n\r\n" not in answer:
            answer += self._receive()
        head, _, rest = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 %d " % status), head
        (length,) = (int(line[16:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length: "))
        while len(rest) < length:
            rest += self._receive()

    def _receive(self) -> bytes:
        data = self._socket.recv(65536)
        assert data, "the server closed the connection"
        return data


def measure_refusal(model: Path, *, turns: int, each: int = 25) -> Row:
    small = json.dumps(body(max_tokens=16)).encode()
    large = json.dumps(body(max_tokens=16, prompt="word " * 100_000)).encode()
    kinds: dict[str, tuple[str, str, bytes | None, int]] = {
        "health": ("GET", "/health", None, 200),
        "small": ("POST", "/v1/tasks", small, 429),
        "large": ("POST", "/v1/tasks", large, 429),
        "small_nowhere": ("POST", "/v1/nowhere", small, 404),
        "large_nowhere": ("POST", "/v1/nowhere", large, 404),
    }
    used: dict[str, list[float]] = {kind: [] for kind in kinds}
    with serving(model, slots=1, ctx=64, capacity=1, still=True) as (url, pid):
        call = _Caller(url)
        for _ in range(2):  # one on the slot, one in the queue
            call(call.request("POST", "/v1/tasks", small), 202)
        for turn in range(turns + 1):
            for kind, (method, path, data, status) in kinds.items():
                request = call.request(method, path, data)
                before = cpu_s(pid)
                for _ in range(each):
                    call(request, status)
                if turn:  # the first one warms up
                    used[kind].append((cpu_s(pid) - before) / each)
    medians = {kind: statistics.median(values) for kind, values in used.items()}
    figures = {f"{kind}_cpu_us": 1e6 * value for kind, value in medians.items()}
    for kind in ("small", "large"):
        figures[f"{kind}_to_health"] = medians[kind] / medians["health"]
        figures[f"{kind}_to_nowhere"] = medians[kind] / medians[f"{kind}_nowhere"]
    return figures


# --- all of it -------------------------------------------------------------------------------------------------------


TARGETS: dict[str, tuple[str, float]] = {
    "waiting.p99_ratio": ("<=", 1.5),
    **{
        f"honesty.{mix}.{slots}.{figure}": target
        for mix in MIXES
        for slots in (1, 8)
        for figure, target in {
            "admitted_on_first_retry": (">=", 0.8),
            "refused_per_admitted": ("<=", 1.5),
            "median_prediction_error": ("<=", 0.3),
            "idle_while_told_to_wait": ("<=", 0.02),
        }.items()
    },
    "refusal.small_to_health": ("<=", 1.3),
    "refusal.large_to_health": ("<=", 1.3),
    "refusal.large_to_nowhere": ("<=", 1.3),
}


def show(figures: Row, repeats: list[Row]) -> None:
    print(f"\n{'figure':44} {'median':>12} {'lowest':>12} {'highest':>12}  wanted")
    for name, value in figures.items():
        values = [row[name] for row in repeats]
        wanted = "{} {}".format(*TARGETS[name]) if name in TARGETS else ""
        print(f"{name:44} {value:12.3f} {min(values):12.3f} {max(values):12.3f}  {wanted}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short repeat, to see that it works")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", choices=["waiting", "path", "honesty", "refusal"], action="append")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    quick: bool = options.quick
    parts = options.only or ["waiting", "path", "honesty", "refusal"]
    repeats: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        tiny = write_tiny_llama(Path(folder) / "tiny.gguf", n_ctx_train=2048)
        # A large vocabulary slows a step to what a small real model takes, so that streams leave a core to the server.
        words = (*PIECES, *(f"▁word{number}" for number in range(32_000)))
        slow = write_tiny_llama(Path(folder) / "slow.gguf", pieces=words, n_ctx_train=65536)
        honest = write_model(Path(folder) / "honest.gguf")
        for number in range(1 if quick else options.repeat):
            print(f"repeat {number + 1}", flush=True)
            row: Row = {}
            if "waiting" in parts:
                levels = (0, 100, 1000) if quick else (0, 100, 1000, 10_000)
                found = asyncio.run(measure_waiting(slow, levels=levels, samples=200 if quick else 1000))
                row |= {f"waiting.{name}": value for name, value in found.items()}
            if "path" in parts:
                found = asyncio.run(measure_path(tiny, seconds=3 if quick else 10))
                row |= {f"path.{name}": value for name, value in found.items()}
            if "honesty" in parts:
                for mix in MIXES:
                    for slots in (1, 8):
                        found = asyncio.run(
                            measure_honesty(
                                honest, mix=mix, slots=slots, capacity=CAPACITY, bursts=2 if quick else None
                            )
                        )
                        row |= {f"honesty.{mix}.{slots}.{name}": value for name, value in found.items()}
            if "refusal" in parts:
                found = measure_refusal(tiny, turns=4 if quick else 20)
                row |= {f"refusal.{name}": value for name, value in found.items()}
            repeats.append(row)
    figures = {name: statistics.median(row[name] for row in repeats) for name in repeats[0]}
    show(figures, repeats)
    if options.json:
        machine = {"cores": usable_cores(), "load": os.getloadavg()}
        options.json.write_text(
            json.dumps({"machine": machine, "median": figures, "repeats": repeats}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
