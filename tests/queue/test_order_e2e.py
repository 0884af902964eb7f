"""The order of starts with real models on real worker threads, over real HTTP."""

from __future__ import annotations

import asyncio
import json
import socket
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from engines.api import DeviceSpec
from orchd.machine.devices import Device
from orchd.queue.task_queue import TaskQueue
from orchd.queue.tasks import Task
from orchd.server import Server
from orchd.settings.config import Config, PoolConfig, QueueConfig, TasksConfig
from orchd.settings.credentials import Credentials
from testkit.brake import Brake, BrakedEngine
from testkit.observers import WhenReady

TOKEN = "a-token-for-the-tests-of-order"
CPUS = [Device(f"cpu#{index}", DeviceSpec("cpu", threads=1)) for index in range(2)]


@dataclass
class Http:
    """A server and a client of it.

    Attributes:
        brake: Can hold every model's tasks where they are.
        taken: Ids of tasks in the order in which they left the queue, by pool.
        started: Ids of tasks in the order in which their ``started`` event was written, by pool.
    """

    session: aiohttp.ClientSession
    brake: Brake
    taken: dict[str, list[str]]
    started: dict[str, list[str]]

    async def submit(self, pool: str, *, priority: str = "interactive", max_tokens: int = 4) -> str:
        body = {
            "pool_id": pool,
            "priority": priority,
            "prompt": f"hello {pool}",
            "max_tokens": max_tokens,
            "ignore_eos": True,
        }
        async with self.session.post("/v1/tasks", json=body) as response:
            assert response.status == 202, await response.text()
            return str((await response.json())["task_id"])

    async def follow(self, task_id: str) -> list[tuple[str, dict[str, Any]]]:
        async with self.session.get(f"/v1/tasks/{task_id}/stream") as response:
            blocks = (await response.text()).split("\n\n")
        events = []
        for block in blocks:
            lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
            if lines:
                events.append((lines["event"], json.loads(lines["data"])))
        return events

    @asynccontextmanager
    async def occupy(self, pool: str, count: int) -> AsyncIterator[None]:
        """Give so many slots of a pool long tasks, then hang up, which cancels them."""
        streams = []
        for _ in range(count):
            task_id = await self.submit(pool, max_tokens=4000)
            streams.append(await self.session.get(f"/v1/tasks/{task_id}/stream"))
        for stream in streams:
            await stream.content.readuntil(b"\n\n")  # `started`
        try:
            yield
        finally:
            for stream in streams:
                stream.close()


@asynccontextmanager
async def serving(
    model: Path, monkeypatch: pytest.MonkeyPatch, pools: dict[str, list[Device]], *, slots: int
) -> AsyncIterator[Http]:
    config = Config(
        queue=QueueConfig(capacity=100),
        tasks=TasksConfig(cancel_grace_s=0.0),
        pools=tuple(PoolConfig(id=name, slots=slots, ctx=4096, batch=64) for name in pools),
    )
    ready, stop, brake = asyncio.Event(), asyncio.Event(), Brake()
    taken, started = defaultdict[str, list[str]](list), defaultdict[str, list[str]](list)
    start, pop = Task.start, TaskQueue.pop

    def noting_start(task: Task) -> None:
        start(task)
        started[task.pool_id].append(task.id)

    def noting_pop(queue: TaskQueue) -> Task:  # its caller has the lock
        task = pop(queue)
        taken[task.pool_id].append(task.id)
        return task

    monkeypatch.setattr(Task, "start", noting_start)
    monkeypatch.setattr(TaskQueue, "pop", noting_pop)
    observer = WhenReady(lambda _: ready.set())
    server = Server(config, Credentials(TOKEN, "the test"), BrakedEngine(brake), list(pools.values()), observer)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        running = asyncio.create_task(server.run([model] * len(pools), listening, stop=stop))
        up = asyncio.create_task(ready.wait())
        await asyncio.wait({running, up}, timeout=60, return_when=asyncio.FIRST_COMPLETED)
        assert up.done(), running
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        connector = aiohttp.TCPConnector(limit=0)
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with aiohttp.ClientSession(url, connector=connector, headers=headers) as session:
            yield Http(session, brake, taken, started)
        stop.set()
        assert await asyncio.wait_for(running, 30) == 0


PRIORITIES = ["batch", "interactive", "batch", "batch", "interactive", "interactive", "batch", "interactive"] * 3


async def _submit_mix(http: Http, pool: str) -> list[str]:
    """Tasks of both priorities, one after the other; their ids in the order in which they must start."""
    ids: dict[str, list[str]] = {"interactive": [], "batch": []}
    for priority in PRIORITIES:
        ids[priority].append(await http.submit(pool, priority=priority))
    return ids["interactive"] + ids["batch"]


async def test_tasks_start_by_priority_then_arrival(tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tiny_model_path, monkeypatch, {"default": CPUS[:1]}, slots=2) as http:
        async with http.occupy("default", 2):
            http.brake.hold()
            order = await _submit_mix(http, "default")
            assert len(http.taken["default"]) == 2  # nothing but what occupies the slots
            http.brake.release()
        for task_id in order:
            events = await http.follow(task_id)
            names = [name for name, _ in events]
            assert names[0] == "started"
            assert names[-1] == "end"
            assert set(names[1:-1]) == {"token"}
            assert events[-1][1]["finish_reason"] == "length"
        assert http.taken["default"][2:] == order
        assert http.started["default"][2:] == order


async def test_two_workers_and_two_pools_keep_each_pools_order(
    tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tiny_model_path, monkeypatch, {"a": CPUS, "b": CPUS}, slots=1) as http:
        async with http.occupy("a", 2), http.occupy("b", 2):
            http.brake.hold()
            orders = {pool: await _submit_mix(http, pool) for pool in ("a", "b")}
            assert [len(http.taken[pool]) for pool in orders] == [2, 2]
            http.brake.release()
        for pool, order in orders.items():
            for task_id in order:
                assert (await http.follow(task_id))[-1][1]["finish_reason"] == "length"
            assert http.taken[pool][2:] == order
            # Two threads tell of the tasks they took, so what is told may be in another order than what was taken.
            assert sorted(http.started[pool][2:]) == sorted(order)


async def test_a_pool_progresses_beside_a_busy_one_on_the_same_device(
    tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        serving(tiny_model_path, monkeypatch, {"busy": CPUS[:1], "quiet": CPUS[:1]}, slots=4) as http,
        http.occupy("busy", 4),
    ):
        for _ in range(3):
            events = await http.follow(await http.submit("quiet", max_tokens=20))
            assert events[-1][1]["finish_reason"] == "length"
        async with http.session.get("/health") as response:
            busy, quiet = (await response.json())["pools"]
        assert [pool["replicas"][0]["busy"] for pool in (busy, quiet)] == [4, 0]
