"""What is asked of a server in each scenario, and what is measured."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from benchmarks.compare import load
from benchmarks.compare.drivers import GREEDY, SAMPLING, Task
from benchmarks.compare.prompts import Prompts
from benchmarks.compare.servers import Running
from benchmarks.compare.stats import Metrics, latencies, percentile, summarise, within

MIB: Final = 1 << 20


class Work:
    """Tasks for one run. The same pair gives both servers the same ones."""

    def __init__(self, prompts: Prompts, seed: str, *, quick: bool) -> None:
        self.quick = quick
        self.seed = seed
        self._prompts = prompts
        self._seeds = random.Random(seed)

    def task(
        self, prompt_tokens: int, max_tokens: int, *, prefix: str = "", sampling: Mapping[str, float] = SAMPLING
    ) -> Task:
        """A task whose prompt is `prefix` and so many tokens of its own."""
        return Task(prefix + self._prompts.text(prompt_tokens), max_tokens, self._seeds.randrange(1 << 31), sampling)

    def tasks(
        self,
        clients: int,
        each: int,
        prompt_tokens: int,
        max_tokens: int,
        *,
        sampling: Mapping[str, float] = SAMPLING,
    ) -> list[list[Task]]:
        """For each client so many unrelated tasks."""
        return [[self.task(prompt_tokens, max_tokens, sampling=sampling) for _ in range(each)] for _ in range(clients)]

    def batch_task(self, prompt_tokens: int, max_tokens: int) -> Task:
        """A task for whose answer nobody waits."""
        return replace(self.task(prompt_tokens, max_tokens), batch=True)

    def text(self, tokens: int) -> str:
        return self._prompts.text(tokens)


async def warm_up(server: Running, work: Work) -> None:
    """A few tokens on every slot that a measured load may use, never measured."""
    clients = min(server.setup.slots, 16)
    await load.closed_loop(server, work.tasks(clients, 1, 8, 16))
    await asyncio.sleep(0.2)


async def decode(server: Running, work: Work, *, clients: int) -> Metrics:
    """Unrelated prompts; a client alone sends more of them, because its run would be over in 3 s otherwise."""
    tokens, each = (96, 1) if work.quick else (256, 2 if clients > 1 else 5)
    return summarise(await load.closed_loop(server, work.tasks(clients, each, 32, tokens)))


PEOPLE: Final = {
    "type": "array",
    "minItems": 500,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 40},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "city": {"type": "string", "maxLength": 40},
            "job": {"enum": ["doctor", "teacher", "farmer", "student"]},
        },
        "required": ["name", "age", "city", "job"],
        "additionalProperties": False,
    },
}
"""More than any output here can hold, so that all are as long as those of `decode`."""


async def json_by_schema(server: Running, work: Work, *, clients: int) -> Metrics:
    """`decode` with a schema, after the same tasks without one."""
    tokens, each = (96, 1) if work.quick else (256, 2 if clients > 1 else 5)
    tasks = work.tasks(clients, each, 32, tokens)
    free = summarise(await load.closed_loop(server, tasks))
    held = summarise(
        await load.closed_loop(server, [[replace(task, json_schema=PEOPLE) for task in own] for own in tasks])
    )
    return {**held, "of_free": held["tokens_per_s"] / free["tokens_per_s"]}


async def long_prompt(server: Running, work: Work) -> Metrics:
    """Four streams all the time; every 4 s a prompt of 1,000 tokens that shares nothing with an earlier one."""
    every_s, times = 4.0, 2 if work.quick else 4
    arrivals = [[work.task(1000, 16)] for _ in range(times)]
    async with load.background(server, lambda: work.task(32, 1536), clients=4, settle_tokens=16) as streams:
        start_s = load.clock()

        async def arrive(index: int) -> float:
            await asyncio.sleep(0.5 + index * every_s)
            (sample,) = await load.closed_loop(server, [arrivals[index]])
            return sample.ttft_s

        ttft_s = await asyncio.gather(*(arrive(index) for index in range(times)))
        await asyncio.sleep(max(0.0, start_s + times * every_s - load.clock()))
        end_s = load.clock()
    running = [part for s in streams() if len((part := within(s, start_s, end_s)).token_s) > 1]
    figures = latencies(running)
    return {
        "tokens_per_s": (sum(part.tokens for part in running) + 16 * times) / (end_s - start_s),
        "long_ttft_p50_ms": percentile(ttft_s, 50) * 1e3,
        "long_ttft_max_ms": max(ttft_s) * 1e3,
        **{name: figures[name] for name in ("itl_p50_ms", "itl_p99_ms", "itl_max_ms")},
    }


async def shared_prefix(server: Running, work: Work) -> Metrics:
    """Eight requests at the same moment, to a server that has never seen the prefix."""
    prefix = work.text(500)
    return summarise(await load.closed_loop(server, [[work.task(32, 32, prefix=prefix)] for _ in range(8)]))


async def memory(server: Running, work: Work) -> Metrics:
    """After work on all slots, and once the caches of the work before have settled; then CPU with nothing to do."""
    await load.closed_loop(server, work.tasks(8, 1, 256, 16))
    rest_s, idle_s = (1.0, 4.0) if work.quick else (3.0, 20.0)
    await asyncio.sleep(rest_s)
    cpu_s, began = server.cpu_s(), time.perf_counter()
    await asyncio.sleep(idle_s)
    return {
        "rss_mib": server.rss_bytes() / MIB,
        "idle_cpu_percent": 100 * (server.cpu_s() - cpu_s) / (time.perf_counter() - began),
    }


async def path(server: Running, work: Work, *, clients: int) -> Metrics:
    each = (5 if work.quick else 20) if clients == 1 else (3 if work.quick else 10)
    own_s, began = time.process_time(), time.perf_counter()
    figures = summarise(await load.closed_loop(server, work.tasks(clients, each, 16, 200, sampling=GREEDY)))
    share = (time.process_time() - own_s) / (time.perf_counter() - began)
    return {**figures, "client_cpu_percent": 100 * share}


async def poisson(server: Running, work: Work) -> Metrics:
    """Prompts of 16 to 512 tokens at random moments, 1.5 a second, 48 tokens each."""
    lengths = random.Random(work.seed)
    tasks = [work.task(int(16 * 32 ** lengths.random()), 48) for _ in range(30)]
    return summarise(await load.poisson(server, tasks, rate_per_s=1.5, seed=work.seed))


async def sweep(server: Running, work: Work) -> Metrics:
    """As many clients as slots; what the event loop costs and how late it is, seen from outside."""
    slots = server.setup.slots
    tasks = work.tasks(slots, max(2, 32 // slots), 16, 200, sampling=GREEDY)
    probes_s: list[float] = []

    async def probe() -> None:
        while True:
            began = time.perf_counter()
            async with server.session.get(server.driver.health) as answer:
                await answer.read()
            probes_s.append(time.perf_counter() - began)
            await asyncio.sleep(0.02)

    probing = asyncio.create_task(probe())
    loop_s, all_s = server.main_thread_cpu_s(), server.cpu_s()
    samples = await load.closed_loop(server, tasks)
    loop_s, all_s = server.main_thread_cpu_s() - loop_s, server.cpu_s() - all_s
    probing.cancel()
    tokens = sum(sample.tokens for sample in samples)
    return {
        **summarise(samples),
        "loop_cpu_us_per_token": loop_s / tokens * 1e6,
        "cpu_us_per_token": all_s / tokens * 1e6,
        "health_p50_ms": percentile(probes_s, 50) * 1e3,
        "health_p99_ms": percentile(probes_s, 99) * 1e3,
    }
