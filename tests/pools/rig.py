"""Workers and pools on fake models, without an event loop: rounds are made by hand, or by real threads."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from engines.api import FinishReason
from orchd.errors import Code
from orchd.pools.replica import Instance, Replica
from orchd.pools.reports import Begun, Ended, InstanceClosed, Progress, ReplicaDown, Report
from orchd.pools.worker import Worker
from orchd.queue.scheduler import Found, Scheduler
from orchd.queue.slots import ReplicaSlots
from orchd.queue.tasks import Task
from orchd.schemas import Priority
from testkit.builders import Clock, make_task
from testkit.fake_engine import FakeModel


@dataclass
class RigPool:
    scheduler: Scheduler[Instance]
    replicas: list[Replica]
    models: list[FakeModel]


@dataclass
class Rig:
    """So many workers, each with a replica of so many pools.

    Attributes:
        reports: All that the workers told, in order.
        accepted: Every task that was submitted.
        cancelled_waiting: Those of them that were cancelled before they were taken.
    """

    clock: Clock
    workers: list[Worker]
    pools: list[RigPool]
    reports: list[Report] = field(default_factory=list)
    accepted: list[Task] = field(default_factory=list)
    cancelled_waiting: list[Task] = field(default_factory=list)
    told: threading.Condition = field(default_factory=threading.Condition)

    def post(self, reports: list[Report]) -> None:
        with self.told:
            self.reports += reports
            self.told.notify_all()

    # --- doing -----------------------------------------------------------------------------------------------------

    def submit(self, *, pool: int = 0, max_tokens: int = 1, priority: Priority = Priority.INTERACTIVE) -> Task:
        return self.put(make_task(priority, max_tokens=max_tokens, pool_id=str(pool)))

    def put(self, task: Task) -> Task:
        scheduler = self.pools[int(task.pool_id)].scheduler
        with scheduler.reservation(task.priority):
            self.accepted.append(task)
            scheduler.submit(task)
        return task

    def cancel(self, task: Task) -> None:
        """As the service does it."""
        place = self.pools[int(task.pool_id)].scheduler.cancel(task)
        if place is Found.WAITING:
            self.cancelled_waiting.append(task)
        elif place is Found.RUNNING:
            for worker in self.workers:
                worker.cancel(task)

    def rounds(self, count: int = 1) -> None:
        """So many rounds of every worker, on this thread."""
        for _ in range(count):
            for worker in self.workers:
                worker.round()
            for pool in self.pools:
                pool.scheduler.check_integrity()

    def replace(self, pool: int, replica: int) -> FakeModel:
        """Bring a replica (back) up on a new model."""
        there = self.pools[pool].replicas[replica]
        model = FakeModel(there.slots.total)
        self.pools[pool].models[replica] = model
        instance = Instance(model)
        self.pools[pool].scheduler.bring_back(there.slots, instance)
        self.workers[replica].adopt(there, instance)
        return model

    # --- looking ---------------------------------------------------------------------------------------------------

    def ends(self) -> dict[str, list[Ended]]:
        """Every end that was told, by task."""
        ends = defaultdict(list)
        for report in self.reports:
            if isinstance(report, Ended):
                ends[report.task.id].append(report)
        return ends

    def end_of(self, task: Task) -> tuple[FinishReason, Code | None]:
        """How a task ended; it must have exactly once."""
        (end,) = self.ends()[task.id]
        return end.reason, None if end.error is None else end.error.code

    def begun(self) -> list[Task]:
        return [report.task for report in self.reports if isinstance(report, Begun)]

    def down(self) -> list[Replica]:
        return [report.replica for report in self.reports if isinstance(report, ReplicaDown)]

    def closed(self) -> list[InstanceClosed]:
        return [report for report in self.reports if isinstance(report, InstanceClosed)]

    def texts(self, task: Task) -> list[str]:
        return [report.text for report in self.reports if isinstance(report, Progress) and report.task is task]

    def await_ends(self, *tasks: Task) -> None:
        """Wait until all of them have ended."""
        ids = {task.id for task in tasks}
        with self.told:
            assert self.told.wait_for(lambda: ids <= self.ends().keys(), timeout=20)

    def check(self) -> None:
        """Each task's reports are in order: begun once before anything else, ended once, nothing after."""
        seen: dict[str, list[type[Report]]] = defaultdict(list)
        for report in self.reports:
            if isinstance(report, Begun | Progress | Ended):
                seen[report.task.id].append(type(report))
        for kinds in seen.values():
            assert kinds[0] is Begun
            assert kinds.count(Begun) == 1
            assert kinds.count(Ended) <= 1
            assert Ended not in kinds[:-1]
        assert not self.ends().keys() & {task.id for task in self.cancelled_waiting}

    def check_all_ended(self) -> None:
        """Every accepted task has exactly one end."""
        self.check()
        ended = Counter({task_id: len(ends) for task_id, ends in self.ends().items()})
        ended.update(task.id for task in self.cancelled_waiting)
        assert ended == Counter(task.id for task in self.accepted)
        for pool in self.pools:
            assert not pool.scheduler.waiting()
            assert not any(slots.running for slots in pool.scheduler.replicas)


def make_rig(*, workers: int = 1, pools: int = 1, slots: int = 2, capacity: int = 64, gated: bool = False) -> Rig:
    clock = Clock()
    made = []
    threads = [Worker(f"fake:{index}", clock=clock) for index in range(workers)]
    for _ in range(pools):
        own = [ReplicaSlots[Instance](index, slots, wake=worker.wake) for index, worker in enumerate(threads)]
        scheduler = Scheduler(capacity, own, clock=clock)
        replicas = [
            Replica(str(index), worker.device, own[index], scheduler, worker) for index, worker in enumerate(threads)
        ]
        models = [FakeModel(slots, gated=gated) for _ in replicas]
        instances = [Instance(model) for model in models]
        scheduler.switch(instances, {})
        for worker, replica, instance in zip(threads, replicas, instances, strict=True):
            worker.replicas.append(replica)
            replica.instances.append(instance)
        made.append(RigPool(scheduler, replicas, models))
    rig = Rig(clock, threads, made)
    for worker in threads:
        worker._post = rig.post  # as `start` does
    return rig


@contextmanager
def running(rig: Rig) -> Iterator[Rig]:
    """The same with real threads."""
    for worker in rig.workers:
        worker.start(rig.post)
    try:
        yield rig
    finally:
        for worker in rig.workers:
            worker.stop()
        for worker in rig.workers:
            assert worker.join(20)
