"""Schedulers as tests want them, and what workers take from them: each is a set of woken replicas and no thread."""

from __future__ import annotations

import functools
from weakref import WeakKeyDictionary

from orchd.scheduler import Scheduler
from orchd.seat import Seat
from orchd.tasks import Task
from tests.core.builders import Clock


def make_scheduler(*slots: int, capacity: int = 64, clock: Clock | None = None) -> Scheduler:
    seats = [Seat(index, count, ready=True, host=f"host {index}") for index, count in enumerate(slots)]
    awake: set[int] = set()
    for seat in seats:
        seat.wake = functools.partial(awake.add, seat.index)
    scheduler = Scheduler(capacity, seats, clock=clock or Clock())
    AWAKE[scheduler] = awake
    return scheduler


AWAKE: WeakKeyDictionary[Scheduler, set[int]] = WeakKeyDictionary()
"""The replicas of each scheduler whose workers were woken and have not looked yet."""


def submit(scheduler: Scheduler, *tasks: Task) -> None:
    for task in tasks:
        with scheduler.reservation(task.priority):
            scheduler.submit(task)


def take(scheduler: Scheduler, seat: Seat) -> Task | None:
    found = scheduler.next_for(seat)
    return None if found is None else found[0]


def take_all(scheduler: Scheduler) -> list[Task]:
    """What the workers start that were woken, and those that they wake in turn."""
    taken = []
    while AWAKE[scheduler]:
        seat = scheduler.seats[AWAKE[scheduler].pop()]
        while (found := take(scheduler, seat)) is not None:
            taken.append(found)
    return taken
