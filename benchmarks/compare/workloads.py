"""The scenarios: what is asked of a server, what is measured, and what is to be reached."""

from __future__ import annotations

import asyncio
import functools
import random
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal

from benchmarks.compare import conversations, editing, load
from benchmarks.compare.drivers import GREEDY, SAMPLING, Task
from benchmarks.compare.prompts import Prompts
from benchmarks.compare.servers import Running
from benchmarks.compare.stats import Metrics, Target, latencies, percentile, summarise, within

Peer = str
"""A server's name: ``llama-server``, also with a kind of guesses, ``llama_cpp.server``, or `WITHOUT_GUESSES`."""
WITHOUT_GUESSES: Final = "orchd without guesses"
GUESSING: Final = tuple(
    f"llama-server {kind}" for kind in ("ngram-simple", "ngram-map-k", "ngram-map-k4v", "ngram-cache", "ngram-mod")
)
Use = Literal["real", "tiny"]
MIB: Final = 1 << 20


@dataclass(frozen=True)
class Shape:
    """What a server is started with.

    Attributes:
        use: ``tiny`` is the generated model, with which only the serving path counts.
        prompt_store: See `drivers.Setup`.
    """

    slots: int
    ctx: int
    use: Use = "real"
    prompt_store: bool = True


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


Run = Callable[[Running, Work], Awaitable[Metrics]]


@dataclass(frozen=True)
class Scenario:
    """One row of the table."""

    name: str
    about: str
    shape: Shape
    run: Run
    targets: tuple[Target, ...] = ()
    peers: tuple[Peer, ...] = ("llama-server",)
    in_quick: bool = True


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


_REAL = Shape(slots=8, ctx=2048)
_FOUR = Shape(slots=4, ctx=2048)
_LONG = Shape(slots=4, ctx=8192)
_TINY = Shape(slots=16, ctx=512, use="tiny")
_BOTH: Final[tuple[Peer, ...]] = ("llama-server", "llama_cpp.server")


_ALL: Final = ("llama-server", WITHOUT_GUESSES, *GUESSING)


def _than(peer: Peer, bound: float, model: str = "") -> Target:
    return Target("tokens_per_s", "at least", bound, peer=peer, model=model)


def _than_own(bound: float, model: str = "") -> Target:
    return _than(WITHOUT_GUESSES, bound, model)


def _rate(bound: float) -> tuple[Target, ...]:
    return (_than("llama-server", bound),)


_DECODING: Final = (*_rate(1.0), _than_own(0.99))

SCENARIOS: Final = (
    Scenario("decode-1", "1 client", _REAL, functools.partial(decode, clients=1), _DECODING, (*_BOTH, WITHOUT_GUESSES)),
    Scenario(
        "decode-4",
        "4 clients, unrelated prompts",
        _REAL,
        functools.partial(decode, clients=4),
        _DECODING,
        ("llama-server", WITHOUT_GUESSES),
    ),
    Scenario(
        "decode-8",
        "8 clients, unrelated prompts",
        _REAL,
        functools.partial(decode, clients=8),
        _DECODING,
        ("llama-server", WITHOUT_GUESSES),
    ),
    *(
        Scenario(
            f"json-{clients}",
            f"{clients} client{'s' * (clients > 1)}, JSON by schema",
            _REAL,
            functools.partial(json_by_schema, clients=clients),
            (*_rate(1.5), Target("of_free", "at least", 0.95, of="value")),
        )
        for clients in (1, 8)
    ),
    Scenario(
        "edit-1",
        "a text of 400 tokens given back with changes, 1 client",
        _REAL,
        functools.partial(editing.edit, clients=1),
        (_than_own(1.9, "Q4_0"), _than_own(1.4, "Q4_1"), *(_than(peer, 1.15) for peer in GUESSING)),
        _ALL,
    ),
    Scenario(
        "edit-4",
        "the same, 4 clients",
        _REAL,
        functools.partial(editing.edit, clients=4),
        (_than_own(1.1),),
        _ALL,
    ),
    Scenario("extract-1", "fields from a document as JSON, 1 client", _REAL, editing.extract, (), _ALL),
    Scenario("poisson", "Poisson arrivals, 1.5 a second", _REAL, poisson, in_quick=False),
    Scenario(
        "long-prompt",
        "a 1,000-token prompt every 4 s beside 4 streams",
        _REAL,
        long_prompt,
        (
            Target("itl_max_ms", "at most", 0.08),
            Target("long_ttft_p50_ms", "at most", 1.3),
            Target("tokens_per_s", "at least", 0.97),
        ),
    ),
    Scenario(
        "shared-prefix",
        "8 clients, a common prefix of 500 tokens, cold",
        _REAL,
        shared_prefix,
        (Target("ttft_p99_ms", "at most", 0.3), Target("requests_per_s", "at least", 2.0)),
    ),
    *(
        Scenario(
            f"conversations-{count}",
            f"{count} conversations on 4 slots, turns 2 to 4",
            _FOUR,
            functools.partial(conversations.conversations, count=count),
            (Target("ttft_p50_ms", "at most", 0.9), Target("ttft_p99_ms", "at most", 1.0)),
        )
        for count in (3, 12)
    ),
    Scenario(
        "agent",
        "a prompt that grows to 6,000 tokens beside 2 streams",
        _LONG,
        conversations.agent,
        (
            Target("ttft_p50_ms", "at most", 0.9),
            Target("ttft_p99_ms", "at most", 1.0),
            Target("itl_max_ms", "at most", 0.3),
        ),
    ),
    Scenario(
        "short-behind-long",
        "16 tokens, 0.3 s after a prompt of 5,000",
        _LONG,
        conversations.short_behind_long,
        (Target("ttft_p50_ms", "at most", 0.1),),
    ),
    Scenario(
        "interactive-beside-batch",
        "a 1,000-token prompt beside 3 batch streams",
        _LONG,
        conversations.interactive_beside_batch,
        (Target("ttft_p50_ms", "at most", 1.05),),
    ),
    Scenario(
        "memory",
        "8 slots of 2,048 tokens, after work",
        replace(_REAL, prompt_store=False),
        memory,
        (Target("rss_mib", "at most", 1.15), Target("idle_cpu_percent", "at most", 0.5, of="value")),
    ),
    Scenario("path-1", "tiny model, 1 client", _TINY, functools.partial(path, clients=1), _rate(1.5), _BOTH),
    Scenario("path-16", "tiny model, 16 clients", _TINY, functools.partial(path, clients=16), _rate(3.0)),
)

SWEEP: Final = "slots-sweep"
SWEEP_SLOTS: Final = (1, 2, 4, 8, 16, 32, 64)


def rows(names: set[str], *, quick: bool, use: Use, peers: Collection[Peer] = ()) -> Iterator[tuple[Scenario, Peer]]:
    """What is measured with such a model beside which peer, of these if any are named, in the order of the table."""
    for scenario in SCENARIOS:
        if scenario.name in names and scenario.shape.use == use and (scenario.in_quick or not quick):
            beside = [peer for peer in scenario.peers if not peers or peer in peers]
            yield from ((scenario, peer) for peer in beside[: 1 if quick else None])
