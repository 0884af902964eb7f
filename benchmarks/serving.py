"""orchd in a process of its own, and clients for it."""

from __future__ import annotations

import asyncio
import multiprocessing
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import aiohttp

from engines.api import DeviceSpec, Engine
from orchd.machine.cores import usable_cores
from orchd.machine.devices import Device
from orchd.server import Server
from orchd.settings.config import Config, PoolConfig, QueueConfig, ServerConfig, TasksConfig
from orchd.settings.credentials import Credentials
from testkit.fake_engine import FakeEngine
from testkit.observers import WhenReady

TOKEN = "a-token-for-the-benchmark"
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
Row = dict[str, Any]


# --- the server, in a process of its own -----------------------------------------------------------------------------


def _serve(parent: Connection, model: Path, config: Config, *, still: bool) -> None:
    """Run a server until the process is terminated. A ``still`` one has a model that never makes a step."""
    engine: Engine
    if still:
        engine = FakeEngine(gated=True, patience_s=3600)
    else:
        from engines.llamacpp.engine import LlamaCppEngine

        engine = LlamaCppEngine()
    threads = max(1, usable_cores() // 2)  # the other half for the event loop and the clients
    devices = [Device("cpu", DeviceSpec("cpu", threads=threads))]
    server = Server(
        config,
        Credentials(TOKEN, "the benchmark"),
        engine,
        [devices],
        WhenReady(lambda summary: parent.send(summary.url)),
    )
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listening:
        asyncio.run(server.run([model], listening))


@contextmanager
def serving(
    model: Path, *, slots: int, ctx: int, capacity: int, cancel_grace_s: float = 60, still: bool = False
) -> Iterator[tuple[str, int]]:
    """A server's URL and process id."""
    config = Config(
        server=ServerConfig(max_body_bytes=1 << 20),
        queue=QueueConfig(capacity=capacity),
        tasks=TasksConfig(cancel_grace_s=cancel_grace_s, retention_s=30),
        pools=(PoolConfig(slots=slots, ctx=ctx, batch=512),),
    )
    spawn = multiprocessing.get_context("spawn")
    parent, child = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(child, model, config), kwargs={"still": still}, daemon=True)
    process.start()
    child.close()  # so that its death shows here
    try:
        assert process.pid is not None
        assert parent.poll(60), "the server does not come up"
        yield parent.recv(), process.pid
    finally:
        process.kill()
        process.join()


def cpu_s(pid: int) -> float:
    """CPU time of every living thread of a process, to the nanosecond."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9


def resident_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


# --- clients ---------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def client(url: str) -> AsyncIterator[aiohttp.ClientSession]:
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(url, connector=connector, headers=HEADERS, timeout=timeout) as session:
        yield session


def body(*, max_tokens: int, priority: str = "interactive", prompt: str = "hello world") -> Row:
    return {"prompt": prompt, "max_tokens": max_tokens, "priority": priority, "ignore_eos": True}


async def submit(session: aiohttp.ClientSession, wanted: Row) -> str:
    async with session.post("/v1/tasks", json=wanted) as response:
        assert response.status == 202, await response.text()
        return str((await response.json())["task_id"])


async def read(session: aiohttp.ClientSession, task_id: str) -> AsyncIterator[str]:
    """Names of a task's events, as they come."""
    async with session.get(f"/v1/tasks/{task_id}/stream") as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            if line.startswith(b"event: "):
                yield line[7:].strip().decode()


async def follow(session: aiohttp.ClientSession, task_id: str) -> None:
    async for _ in read(session, task_id):
        pass


async def leave(session: aiohttp.ClientSession, task_id: str) -> None:
    """Listen and go away, which cancels the task."""
    response = await session.get(f"/v1/tasks/{task_id}/stream")
    response.close()


async def together(jobs: Sequence[Callable[[], Awaitable[Any]]], at_a_time: int) -> list[Any]:
    """Results of all jobs, so many at a time."""
    results: list[Any] = [None] * len(jobs)
    left = iter(range(len(jobs)))

    async def work() -> None:
        for number in left:
            results[number] = await jobs[number]()

    await asyncio.gather(*(work() for _ in range(at_a_time)))
    return results


async def pool_health(session: aiohttp.ClientSession) -> Row:
    async with session.get("/health") as response:
        pool: Row = (await response.json())["pools"][0]
        return pool


async def depth(session: aiohttp.ClientSession) -> int:
    async with session.get("/metrics") as response:
        lines = (await response.text()).splitlines()
    return sum(int(float(line.rsplit(" ", 1)[1])) for line in lines if line.startswith("queue_depth{"))
