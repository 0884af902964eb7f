"""The load client. Its reading loop is the same for every server: note when bytes came, look into them afterwards."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from benchmarks.compare.drivers import Driver, Task
from benchmarks.compare.servers import Running
from benchmarks.compare.stats import Sample

clock = time.perf_counter
DEADLINE_S = 300.0
"""No load of this benchmark takes as long."""


@dataclass
class Recording:
    """One request while it is measured: nothing is decoded yet."""

    task: Task
    sent_s: float
    reads: list[tuple[float, bytes]] = field(default_factory=list)
    whole: bool = False

    def sample(self, driver: Driver) -> Sample | None:
        """The request as a sample; None if no token came.

        Raises:
            RuntimeError: The server ended the stream with an error, or before it had written what was asked for.
        """
        times: list[float] = []
        stated: int | None = None
        for at_s, event in _events(self.reads):
            piece = driver.read(event)
            if piece.text:
                times.append(at_s)
            stated = piece.tokens_out if piece.tokens_out is not None else stated
        tokens = len(times) if stated is None or not self.whole else stated
        if self.whole and driver.counts and tokens != self.task.max_tokens:
            raise RuntimeError(f"{driver.name} wrote {tokens} tokens where {self.task.max_tokens} were asked for")
        return Sample(self.sent_s, tuple(times), tokens) if times else None


async def record(server: Running, task: Task, into: list[Recording]) -> None:
    """Send a request and read its stream to the end. A cancelled one stays in `into` with what had come."""
    recording = Recording(task, clock())
    into.append(recording)
    reads = recording.reads
    async with server.stream(task) as response:
        async for data in response.content.iter_any():
            reads.append((clock(), data))
    recording.whole = True


async def closed_loop(server: Running, tasks: Sequence[Sequence[Task]]) -> list[Sample]:
    """As many clients as there are lists; each sends its tasks one after the other, all begin at once."""
    recordings: list[Recording] = []

    async def client(mine: Sequence[Task]) -> None:
        for task in mine:
            await record(server, task, recordings)

    await _all(client(mine) for mine in tasks)
    return _samples(recordings, server.driver)


async def poisson(server: Running, tasks: Sequence[Task], *, rate_per_s: float, seed: str) -> list[Sample]:
    """One task after the other at exponentially distributed intervals, whether or not earlier ones are done."""
    recordings: list[Recording] = []
    intervals = random.Random(seed)

    async def after(delay_s: float, task: Task) -> None:
        await asyncio.sleep(delay_s)
        await record(server, task, recordings)

    due_s = 0.0
    arrivals = []
    for task in tasks:
        due_s += intervals.expovariate(rate_per_s)
        arrivals.append(after(due_s, task))
    await _all(arrivals)
    return _samples(recordings, server.driver)


@asynccontextmanager
async def background(
    server: Running, next_task: Callable[[], Task], *, clients: int, settle_tokens: int
) -> AsyncIterator[Callable[[], list[Sample]]]:
    """Streams that run all the time, each client beginning a new one when one ends; entered once all have begun.

    Yields:
        A function that returns what they have received, also after the context has hung up.
    """
    recordings: list[Recording] = []

    async def client() -> None:
        while True:
            await record(server, next_task(), recordings)

    running = [asyncio.create_task(client()) for _ in range(clients)]
    try:
        while len(recordings) < clients or any(len(r.reads) < settle_tokens for r in recordings[:clients]):
            _raise_first(running)
            await asyncio.sleep(0.02)
        yield lambda: _samples(recordings, server.driver)
        _raise_first(running)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def _all(work: Iterable[Awaitable[None]]) -> None:
    await asyncio.wait_for(asyncio.gather(*work), DEADLINE_S)


def _raise_first(running: Iterable[asyncio.Task[None]]) -> None:
    for task in running:
        if task.done():
            task.result()


def _samples(recordings: Iterable[Recording], driver: Driver) -> list[Sample]:
    return [sample for recording in recordings if (sample := recording.sample(driver)) is not None]


def _events(reads: Iterable[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """Events of a `text/event-stream` with the time at which their last byte came."""
    rest = b""
    for at_s, data in reads:
        *events, rest = (rest + data.replace(b"\r", b"")).split(b"\n\n")
        for event in events:
            yield at_s, event
