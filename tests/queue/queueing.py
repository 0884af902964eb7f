"""Schedulers as tests want them, and what workers take from them: each is a set of woken replicas and no thread."""

from __future__ import annotations

import functools
from weakref import WeakKeyDictionary

from orchd.errors import AdmissionReject
from orchd.queue.scheduler import Scheduler
from orchd.queue.slots import ReplicaSlots
from orchd.queue.tasks import Task
from orchd.schemas import Priority
from testkit.builders import Clock, make_task, pause_of


def make_scheduler(*slots: int, capacity: int = 64, clock: Clock | None = None) -> Scheduler[str]:
    replicas = [ReplicaSlots(index, n, ready=True, instance=f"model {index}") for index, n in enumerate(slots)]
    awake: set[int] = set()
    for replica in replicas:
        replica.wake = functools.partial(awake.add, replica.index)
    scheduler = Scheduler(capacity, replicas, clock=clock or Clock())
    AWAKE[scheduler] = awake
    return scheduler


AWAKE: WeakKeyDictionary[Scheduler[str], set[int]] = WeakKeyDictionary()
"""The replicas of each scheduler whose workers were woken and have not looked yet."""


def submit(scheduler: Scheduler[str], *tasks: Task) -> None:
    for task in tasks:
        with scheduler.reservation(task.priority):
            scheduler.submit(task)


def take(scheduler: Scheduler[str], slots: ReplicaSlots[str]) -> Task | None:
    found = scheduler.next_for(slots)
    return None if found is None else found[0]


def take_all(scheduler: Scheduler[str]) -> list[Task]:
    """What the workers start that were woken, and those that they wake in turn."""
    taken = []
    while AWAKE[scheduler]:
        slots = scheduler.replicas[AWAKE[scheduler].pop()]
        while (found := take(scheduler, slots)) is not None:
            taken.append(found)
    return taken


def refused(
    scheduler: Scheduler[str], priority: Priority = Priority.INTERACTIVE, name: str | None = None
) -> float | None:
    """The pause that a sender is told; None if it is not refused."""
    try:
        with scheduler.reservation(priority, name):
            return None
    except AdmissionReject as refusal:
        return pause_of(refusal)


def serve(scheduler: Scheduler[str], clock: Clock, *, seconds: float) -> None:
    """One task comes, runs so long and ends, so that the scheduler knows what a task takes."""
    submit(scheduler, task := make_task())
    (slots,) = (slots for slots in scheduler.replicas if take(scheduler, slots) is task)
    clock.now += seconds
    task.tokens_out, task.first_token_at = 1, clock.now
    scheduler.release(slots, task, completed=True)
