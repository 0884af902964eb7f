"""Whether a full queue tells the truth: clients that wait exactly as told, in every mix of lengths, over real HTTP.

Clients come in bursts of half as many again as there are places, at seven tenths of what the server can do. For each
mix: how many of those that were refused are admitted on their first retry, how often one is refused for each that is
admitted, how far `predicted_start_ms` is off, and how long slots are idle while somebody waits to come back.
"""

from __future__ import annotations

import asyncio
import math
import random
import statistics
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from benchmarks.serving import Row, body, client, pool_health, read, serving
from testkit.tiny_gguf import PIECES, write_tiny_llama

LOAD = 0.7
BURSTS = 7
"""The first one is not counted: it takes so many to learn that refused senders of this server come back."""

QUICK = {"short": 40, "far_below_max": 40}
"""Bursts of mixes that take seconds."""

LOOK_S = 0.01
LEAST_WAIT_MS = 20.0
"""An error is a share of the wait, but of no less than this: opening the stream takes a few milliseconds of its own."""

Wanted = Callable[[random.Random, float], Row]
"""The body of the next task, where such a share of the time has passed."""


def _tokens(*lengths: int) -> Wanted:
    return lambda choose, share: body(max_tokens=choose.choice(lengths))


def _growing(choose: random.Random, share: float) -> Row:
    return body(max_tokens=choose.randint(90, 110) * (1 if share < 0.5 else 10))


def _ended_by_the_model(choose: random.Random, share: float) -> Row:
    """The tiny model writes any of its pieces at random, so this ends anywhere, and far before ``max_tokens``."""
    return body(max_tokens=1800) | {"ignore_eos": False, "stop": ["e"], "seed": choose.getrandbits(32)}


MIXES: dict[str, Wanted] = {
    "short": _tokens(*range(18, 23)),
    "long": _tokens(*range(1400, 1601)),
    "bimodal": _tokens(20, 1500),
    "growing": _growing,
    "far_below_max": _ended_by_the_model,
}


@dataclass
class _Seen:
    first_retries: list[bool] = field(default_factory=list)
    refusals: int = 0
    admissions: int = 0
    errors: list[float] = field(default_factory=list)
    waiting_to_return: int = 0
    idle_slot_s: float = 0.0
    slot_s: float = 0.0


def write_model(path: Path) -> Path:
    """A model whose step takes a few milliseconds, as that of a small real model: submitting takes one or two."""
    return write_tiny_llama(path, pieces=(*PIECES, *(f"▁word{number}" for number in range(8_000))), n_ctx_train=2048)


async def measure_honesty(model: Path, *, mix: str, slots: int, capacity: int, bursts: int | None = None) -> Row:
    """One mix on one number of slots; a few minutes."""
    wanted, choose = MIXES[mix], random.Random(0)
    bursts = bursts or QUICK.get(mix, BURSTS)
    size = (slots + capacity) * 3 // 2
    first, seen = _Seen(), _Seen()
    with serving(model, slots=slots, ctx=2048, capacity=capacity) as (url, _):
        async with client(url) as session:
            task_s = await _seconds_a_task(session, wanted, slots)
            every_s = size * task_s / LOAD
            began = time.perf_counter()
            looking: asyncio.Task[None] | None = None
            jobs: list[asyncio.Task[None]] = []
            for number in range(bursts):
                if number == 1:
                    looking = asyncio.create_task(_look(session, slots, seen))
                for _ in range(size):
                    one = _send(session, wanted(choose, number / bursts), seen if number else first)
                    jobs.append(asyncio.create_task(one))
                await asyncio.sleep(max(0.0, began + (number + 1) * every_s - time.perf_counter()))
            await asyncio.gather(*jobs)
            if looking is not None:
                looking.cancel()
    return {
        "first_retries": len(seen.first_retries),
        "admitted_on_first_retry": statistics.mean(seen.first_retries) if seen.first_retries else math.nan,
        "refused_per_admitted": seen.refusals / seen.admissions,
        "median_prediction_error": statistics.median(seen.errors) if seen.errors else math.nan,
        "idle_while_told_to_wait": seen.idle_slot_s / seen.slot_s,
    }


async def _seconds_a_task(session: aiohttp.ClientSession, wanted: Wanted, slots: int) -> float:
    """How often all slots together end one, the longer ones where lengths grow."""
    choose = random.Random(1)
    count = max(4 * slots, 16)  # of two lengths that differ by 75 times, fewer say little
    began = time.perf_counter()

    async def one() -> None:
        async with session.post("/v1/tasks", json=wanted(choose, 1.0)) as response:
            assert response.status == 202, await response.text()
            task_id = (await response.json())["task_id"]
        async for _ in read(session, task_id):
            pass

    for _ in range(count // slots):
        await asyncio.gather(*(one() for _ in range(slots)))
    return (time.perf_counter() - began) / count


async def _send(session: aiohttp.ClientSession, wanted: Row, seen: _Seen) -> None:
    """Submit, wait as told, and submit again until it is accepted; then follow it."""
    wanted = wanted | {"task_id": str(uuid.uuid4())}
    attempt = 0
    while True:
        async with session.post("/v1/tasks", json=wanted) as response:
            answer = await response.json()
        if attempt == 1:
            seen.first_retries.append(response.status == 202)
        if response.status == 202:
            break
        assert response.status == 429, answer
        attempt += 1
        seen.refusals += 1
        seen.waiting_to_return += 1
        await asyncio.sleep(int(response.headers["X-Backoff-Ms"]) / 1000)
        seen.waiting_to_return -= 1
    seen.admissions += 1
    accepted = time.perf_counter()
    async for event in read(session, answer["task_id"]):
        if event == "started":
            waited_ms = 1000 * (time.perf_counter() - accepted)
            if answer["queue_position"] or answer["predicted_start_ms"]:
                seen.errors.append(abs(answer["predicted_start_ms"] - waited_ms) / max(LEAST_WAIT_MS, waited_ms))


async def _look(session: aiohttp.ClientSession, slots: int, seen: _Seen) -> None:
    """Look at the slots again and again, and add up those that are idle although somebody waits to come back."""
    last = time.perf_counter()
    while True:
        busy = sum(replica["busy"] for replica in (await pool_health(session))["replicas"])
        now = time.perf_counter()
        seen.slot_s += slots * (now - last)
        if seen.waiting_to_return:
            seen.idle_slot_s += (slots - busy) * (now - last)
        last = now
        await asyncio.sleep(LOOK_S)
