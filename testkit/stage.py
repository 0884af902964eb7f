"""A running service on fake models: its pools, worker threads, pauses and clock in the hands of a test."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engines.api import DeviceSpec
from orchd.machine.devices import Device
from orchd.metrics import Metrics
from orchd.models.loader import Loader
from orchd.pools.loading import PoolLoader
from orchd.pools.pool import Pool
from orchd.pools.worker import Worker
from orchd.queue.tasks import Task
from orchd.schemas import Priority, TaskRequest
from orchd.service import Service
from orchd.settings.config import PoolConfig, TasksConfig
from testkit.fake_engine import FakeEngine, FakeModel
from testkit.observers import Quiet


class Pauses:
    """Pauses that end when the test says so."""

    def __init__(self) -> None:
        self._begun: asyncio.Queue[tuple[float, asyncio.Event]] = asyncio.Queue()
        self.seconds: list[float] = []
        self._current: asyncio.Event | None = None

    async def __call__(self, seconds: float) -> None:
        over = asyncio.Event()
        self._begun.put_nowait((seconds, over))
        await over.wait()

    async def begun(self) -> float:
        """Wait until someone pauses; how long they want to."""
        seconds, self._current = await asyncio.wait_for(self._begun.get(), 20)
        self.seconds.append(seconds)
        return seconds

    def end(self) -> None:
        assert self._current is not None
        self._current.set()


class Ahead:
    """The real clock, and so many seconds."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.seconds


@dataclass
class Stage:
    """A running service.

    Attributes:
        accepted: Ids of the accepted tasks.
    """

    engine: FakeEngine
    service: Service
    workers: list[Worker]
    pauses: Pauses
    clock: Ahead
    accepted: list[str] = field(default_factory=list)

    @property
    def pool(self) -> Pool:
        return self.service.pools["default"]

    def model(self, index: int = 0) -> FakeModel:
        return self.engine.models[index]

    async def submit(
        self, *, priority: Priority = Priority.INTERACTIVE, max_tokens: int = 1, pool: str = "default"
    ) -> Task:
        request = TaskRequest(prompt="x", priority=priority, max_tokens=max_tokens, pool_id=pool)
        answer = await self.service.submit(request)
        self.accepted.append(answer.task_id)
        return self.task(answer.task_id)

    def task(self, task_id: str) -> Task:
        task = self.service._tasks.store.get(task_id)
        assert task is not None
        return task

    async def end_of(self, task: Task) -> str:
        """Its finish reason, or the code of its error, when it has ended."""
        await self.until(lambda: task.log.ended)
        data: dict[str, Any] = json.loads(task.log.frames[-1].split(b"data: ")[1])
        return str(data["error"]["code"] if "error" in data else data["finish_reason"])

    async def ends_of(self, tasks: list[Task]) -> Counter[str]:
        return Counter([await self.end_of(task) for task in tasks])

    async def until(self, true: Callable[[], object]) -> None:
        """Give the workers time until something is so."""
        patience = time.monotonic() + 20
        while not true():
            assert time.monotonic() < patience
            await asyncio.sleep(0.001)

    async def check(self) -> None:
        """Every accepted task ended once, and the metrics say so."""
        for task_id in self.accepted:
            await self.end_of(self.task(task_id))
            frames = self.task(task_id).log.frames
            assert sum(b"event: end" in frame for frame in frames) == 1
            assert sum(b"event: started" in frame for frame in frames) <= 1
        enqueued = waiting = 0.0
        for line in Metrics(self.service, "fake-1").render().decode().splitlines():
            if line.startswith("tasks_enqueued_total{"):
                enqueued += float(line.rsplit(" ", 1)[1])
            elif line.startswith("queue_depth{"):
                waiting += float(line.rsplit(" ", 1)[1])
        assert enqueued + waiting == len(self.accepted)
        assert self.service.running == 0


@asynccontextmanager
async def make_stage(
    model_path: Path,
    *,
    replicas: int = 1,
    slots: int = 1,
    capacity: int = 64,
    gated: bool = False,
    pools: tuple[str, ...] = ("default",),
    load_faults: tuple[Exception | None, ...] = (),
    breaks: Exception | None = None,
) -> AsyncIterator[Stage]:
    engine = FakeEngine(gated=gated, breaks=breaks)
    pauses = Pauses()
    clock = Ahead()
    shared = [Device(f"cpu#{index}", DeviceSpec("cpu")) for index in range(replicas)]
    configs = {PoolConfig(id=name, slots=slots, ctx=64): shared for name in pools}
    async with serving(engine, configs, capacity=capacity, clock=clock, sleep=pauses) as (service, workers):
        for pool in service.pools.values():
            await pool.load(model_path)
        engine.load_faults.extend(load_faults)
        yield Stage(engine, service, workers, pauses, clock)


@asynccontextmanager
async def serving(
    engine: FakeEngine,
    configs: Mapping[PoolConfig, Sequence[Device]],
    *,
    capacity: int,
    clock: Callable[[], float],
    sleep: Callable[[float], Awaitable[None]],
    stall_s: float = 60,
    roots: Sequence[Path] = (),
    grace_s: float = 20.0,
) -> AsyncIterator[tuple[Service, list[Worker]]]:
    """A service whose pools have no model yet, and its workers, one a device.

    At its end all threads have ended, and each model of the engine was closed once.
    """
    workers = {device.name: Worker(device.name, clock=clock) for devices in configs.values() for device in devices}
    loader = Loader(engine, Quiet())
    pools = {
        config.id: Pool(
            config,
            devices,
            PoolLoader(config, devices, loader, step_target_s=0.1),
            capacity=capacity,
            worker_of=lambda device: workers[device.name],
            stall_s=stall_s,
            clock=clock,
            sleep=sleep,
        )
        for config, devices in configs.items()
    }
    service = Service(pools, TasksConfig(), roots=roots, grace_s=grace_s, clock=clock)
    for worker in workers.values():
        worker.start(service.post)
    try:
        yield service, list(workers.values())
        for pool in pools.values():
            pool.scheduler.check_integrity()
    finally:
        for model in engine.models:
            model.gated = False
            model.allow(100)
        await service.shut_down(0)
        with contextlib.suppress(RuntimeError):  # a test has closed it
            await loader.run(lambda: None)  # what it was given is done, closing included
        loader.close()
        for worker in workers.values():
            worker.stop()
        for worker in workers.values():
            assert await asyncio.to_thread(worker.join, 20)
    assert [model.closes for model in engine.models] == [1] * len(engine.models)
