"""Schedulers as tests want them, and what workers take from them."""

from __future__ import annotations

from orchd.scheduler import Scheduler
from orchd.seat import Seat
from orchd.tasks import Task
from tests.core.builders import Clock


def make_scheduler(*slots: int, capacity: int = 64, clock: Clock | None = None) -> Scheduler:
    seats = [Seat(index, count, ready=True, host=f"host {index}") for index, count in enumerate(slots)]
    return Scheduler(capacity, seats, clock=clock or Clock())


def submit(scheduler: Scheduler, *tasks: Task) -> None:
    for task in tasks:
        scheduler.reserve()
        scheduler.submit(task)


def take(scheduler: Scheduler, seat: Seat) -> Task | None:
    found = scheduler.next_for(seat)
    return None if found is None else found[0]


def take_all(scheduler: Scheduler) -> list[Task]:
    """What the workers start when each has a turn."""
    taken = []
    for seat in scheduler.seats:
        while (found := take(scheduler, seat)) is not None:
            taken.append(found)
    return taken
