"""Service, pools and worker threads on fake models: what clients see when replicas fail, stall and come back."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from engines.api import DeviceSpec
from engines.errors import DecodeFailed, LoadFailed
from orchd.config import PoolConfig, TasksConfig
from orchd.devices import Device
from orchd.errors import AdmissionReject, PoolUnavailable
from orchd.loader import Loader
from orchd.metrics import Metrics
from orchd.observer import Summary
from orchd.pool_loader import PoolLoader
from orchd.pools import MAX_RECOVERY_PAUSE_S, Pool
from orchd.schemas import Priority, TaskRequest
from orchd.service import Service
from orchd.tasks import Task
from orchd.worker import Worker
from tests.core.builders import pause_of
from tests.support.fake_engine import FakeEngine, FakeModel, Hang

BROKEN = DecodeFailed("broken")


class Quiet:
    """An `orchd.observer.Observer` that says nothing."""

    def loading(self, label: str, share: float) -> None: ...
    def loaded(self, label: str, seconds: float) -> None: ...
    def ready(self, summary: Summary) -> None: ...
    def stopping(self, running: int) -> None: ...
    def stopped(self) -> None: ...


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
        task = self.service._tasks.get(task_id)
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
    devices = [Device(f"cpu#{index}", DeviceSpec("cpu")) for index in range(replicas)]
    workers = {device.name: Worker(device.name, clock=clock) for device in devices}
    loader = Loader(engine, Quiet())
    configs = [PoolConfig(id=name, slots=slots, ctx=64) for name in pools]
    made = {
        config.id: Pool(
            config,
            devices,
            PoolLoader(config, devices, loader, step_target_s=0.1),
            capacity=capacity,
            worker_of=lambda device: workers[device.name],
            stall_s=60,
            clock=clock,
            sleep=pauses,
        )
        for config in configs
    }
    service = Service(made, TasksConfig(), clock=clock)
    stage = Stage(engine, service, list(workers.values()), pauses, clock)
    for worker in workers.values():
        worker.start(service.post)
    try:
        for pool in made.values():
            await pool.load(model_path)
        engine.load_faults.extend(load_faults)
        yield stage
        for pool in made.values():
            pool.scheduler.check_integrity()
    finally:
        for model in engine.models:
            model.gated = False
            model.allow(100)
        await service.drain(0)
        loader.close()
        for worker in workers.values():
            worker.stop()
        for worker in workers.values():
            assert await asyncio.to_thread(worker.join, 20)
        assert all(model.closes for model in engine.models)


async def test_a_failed_step_ends_its_tasks_and_the_next_one_is_served(tiny_model_path: Path) -> None:
    async with make_stage(tiny_model_path) as stage:
        stage.model().step_faults.append(BROKEN)
        tasks = [await stage.submit(), await stage.submit()]
        assert [await stage.end_of(task) for task in tasks] == ["WORKER_RESET", "length"]
        assert stage.service.health().status == "ok"
        await stage.check()


async def test_waiting_tasks_move_to_the_replica_that_is_left_and_health_says_degraded(tiny_model_path: Path) -> None:
    async with make_stage(tiny_model_path, replicas=2, gated=True) as stage:
        stage.model(0).always = BROKEN
        tasks = [await stage.submit() for _ in range(10)]
        stage.model(0).allow(3)
        await stage.pauses.begun()  # it is being brought back
        stage.model(1).allow(100)
        assert await stage.ends_of(tasks) == {"WORKER_RESET": 3, "length": 7}
        health = stage.service.health()
        assert health.status == "degraded"
        assert [replica.alive for replica in health.pools[0].replicas] == [False, True]
        assert health.pools[0].ready
        later = await stage.submit()
        assert await stage.end_of(later) == "length"
        await stage.check()


async def test_with_no_replica_left_waiting_tasks_end_and_new_ones_get_503(tiny_model_path: Path) -> None:
    async with make_stage(tiny_model_path, gated=True) as stage:
        stage.model().always = BROKEN
        tasks = [await stage.submit() for _ in range(8)]
        stage.model().allow(100)
        assert await stage.ends_of(tasks) == {"WORKER_RESET": 3, "POOL_UNAVAILABLE": 5}
        assert not any(b"event: started" in frame for task in tasks[3:] for frame in task.log.frames)
        with pytest.raises(PoolUnavailable) as refusal:
            await stage.submit()
        assert pause_of(refusal.value) >= 1
        health = stage.service.health()
        assert (health.status, health.pools[0].ready) == ("degraded", False)
        await stage.check()


async def test_a_lost_replica_comes_back_after_doubling_pauses_and_serves(tiny_model_path: Path) -> None:
    faults = tuple(LoadFailed("not yet") for _ in range(8))
    async with make_stage(tiny_model_path, load_faults=faults) as stage:
        stage.model().always = BROKEN
        for _ in range(3):
            await stage.end_of(await stage.submit())
        for _ in range(9):
            await stage.pauses.begun()
            stage.pauses.end()
        await stage.until(lambda: stage.pool.ready)
        assert stage.pauses.seconds == [1, 2, 4, 8, 16, 32, MAX_RECOVERY_PAUSE_S, MAX_RECOVERY_PAUSE_S, 60]
        assert await stage.end_of(await stage.submit(max_tokens=3)) == "length"
        assert stage.service.health().status == "ok"
        await stage.check()


async def test_a_replica_that_fails_again_and_again_is_given_longer_and_longer_pauses(tiny_model_path: Path) -> None:
    async with make_stage(tiny_model_path, breaks=BROKEN) as stage:
        for _ in range(4):
            for _ in range(3):
                assert await stage.end_of(await stage.submit()) == "WORKER_RESET"
            await stage.pauses.begun()
            stage.pauses.end()
            await stage.until(lambda: stage.pool.ready)
        assert stage.pauses.seconds == [1, 2, 4, 8]
        await stage.check()


async def test_a_task_that_ends_well_makes_the_pauses_short_again(tiny_model_path: Path) -> None:
    async with make_stage(tiny_model_path) as stage:
        for _ in range(3):
            stage.engine.models[-1].always = BROKEN
            for _ in range(3):
                await stage.end_of(await stage.submit())
            await stage.pauses.begun()
            stage.pauses.end()
            await stage.until(lambda: stage.pool.ready)
            assert await stage.end_of(await stage.submit()) == "length"
        assert stage.pauses.seconds == [1, 1, 1]
        await stage.check()


async def test_one_lost_pool_leaves_the_other_on_the_same_device_alone(tiny_model_path: Path) -> None:
    async with make_stage(tiny_model_path, pools=("default", "other"), slots=2) as stage:
        hang = Hang()
        stage.model(0).step_faults.append(hang)
        stage.model(0).always = BROKEN
        lost = [await stage.submit()]
        await stage.until(hang.began.is_set)  # alone, so that the others take three steps, which all fail
        lost += [await stage.submit() for _ in range(5)]
        fine = [await stage.submit(pool="other", max_tokens=20) for _ in range(6)]
        hang.release.set()
        assert await stage.ends_of(fine) == {"length": 6}
        await stage.ends_of(lost)
        health = stage.service.health()
        assert [pool.ready for pool in health.pools] == [False, True]
        await stage.check()


async def test_a_worker_that_hangs_shows_in_health_after_the_time_and_not_before(tiny_model_path: Path) -> None:
    async with make_stage(tiny_model_path, replicas=2) as stage:
        hang = Hang()
        stage.model(0).step_faults.append(hang)
        task = await stage.submit()
        await stage.until(hang.began.is_set)
        stage.clock.seconds = 59
        assert stage.service.health().status == "ok"
        stage.clock.seconds = 61
        health = stage.service.health()
        assert health.status == "degraded"
        assert [replica.alive for replica in health.pools[0].replicas] == [False, True]
        assert health.pools[0].ready
        hang.release.set()
        assert await stage.end_of(task) == "length"
        await stage.until(lambda: stage.service.health().status == "ok")
        await stage.check()


async def test_tasks_of_a_worker_that_hangs_end_and_what_was_placed_there_moves(tiny_model_path: Path) -> None:
    async with make_stage(tiny_model_path, replicas=2, slots=2) as stage:
        hang = Hang()
        stage.model(0).step_faults.append(hang)
        hanging = await stage.submit()
        await stage.until(hang.began.is_set)
        stage.clock.seconds = 30  # the other worker begins its step later
        stage.model(1).gated = True
        others = [await stage.submit() for _ in range(3)]  # one is placed beside the task that hangs
        stage.clock.seconds = 61
        stage.service.sweep()
        assert await stage.end_of(hanging) == "DECODE_TIMEOUT"
        stage.model(1).allow(100)
        assert await stage.ends_of(others) == {"length": 3}
        hang.release.set()
        await stage.until(lambda: stage.service.health().status == "ok")
        assert await stage.end_of(await stage.submit()) == "length"
        await stage.check()


async def test_with_only_a_hanging_replica_the_pool_is_unavailable(tiny_model_path: Path) -> None:
    async with make_stage(tiny_model_path) as stage:
        hang = Hang()
        stage.model().step_faults.append(hang)
        tasks = [await stage.submit()]
        await stage.until(hang.began.is_set)
        tasks.append(await stage.submit())
        stage.clock.seconds = 61
        stage.service.sweep()
        assert await stage.ends_of(tasks) == {"DECODE_TIMEOUT": 1, "POOL_UNAVAILABLE": 1}
        with pytest.raises(PoolUnavailable):
            await stage.submit()
        hang.release.set()
        await stage.until(lambda: stage.pool.scheduler.any_ready)
        assert await stage.end_of(await stage.submit()) == "length"
        await stage.check()


async def test_a_refusal_of_a_full_queue_is_counted_and_takes_nothing(tiny_model_path: Path) -> None:
    async with make_stage(tiny_model_path, capacity=2, gated=True) as stage:
        tasks = [await stage.submit() for _ in range(3)]
        for _ in range(5):
            with pytest.raises(AdmissionReject) as refusal:
                await stage.submit()
            stage.service.count_rejection(refusal.value)
        assert stage.service.rejected == {"ADMISSION_REJECT": 5}
        stage.model().allow(100)
        assert await stage.ends_of(tasks) == {"length": 3}
        await stage.check()


async def test_ends_equal_accepted_tasks_through_a_day_of_faults(tiny_model_path: Path) -> None:
    async with make_stage(tiny_model_path, replicas=2, slots=2, capacity=6, pools=("default", "other")) as stage:

        async def mend() -> None:
            while True:
                await stage.pauses.begun()
                stage.pauses.end()

        mending = asyncio.create_task(mend())
        refused = 0
        for number in range(300):
            model = stage.engine.models[number % len(stage.engine.models)]
            if number % 11 == 0:
                model.step_faults.extend([BROKEN] * (number % 4))
            pool = ("default", "other")[number % 2]
            try:
                task = await stage.submit(priority=list(Priority)[number % 3 % 2], max_tokens=1 + number % 7, pool=pool)
            except (AdmissionReject, PoolUnavailable):
                refused += 1
            else:
                if number % 5 == 0:
                    stage.service.cancel(task)
            if number % 3 == 0:
                await asyncio.sleep(0.001)
        await stage.check()
        mending.cancel()
        assert refused < 290
