"""Where a task goes: most free slots, then most free memory, then the lowest index."""

from __future__ import annotations

import functools

import pytest

from orchd.placement import Load, least_loaded
from orchd.scheduler import Scheduler
from orchd.seat import Seat
from tests.core.builders import Clock, make_task
from tests.core.queueing import make_scheduler, submit

GIB = 2**30


@pytest.mark.parametrize(
    ("loads", "chosen"),
    [
        ([], None),
        ([(0, 8 * GIB)], None),
        ([(0, 8 * GIB), (0, 0)], None),
        ([(1, 0)], 0),
        ([(4, 0), (4, 0), (4, 0)], 0),
        ([(3, 0), (4, 0), (4, 0)], 1),
        ([(1, 80 * GIB), (2, 1 * GIB)], 1),
        ([(2, 8 * GIB), (2, 24 * GIB)], 1),
        ([(2, 24 * GIB), (2, 24 * GIB)], 0),
        ([(0, 80 * GIB), (1, 0)], 1),
        ([(2, 8 * GIB), (8, 8 * GIB), (8, 7 * GIB)], 1),
        ([(2, 0), (2, 1), (2, 1)], 1),
    ],
)
def test_the_least_loaded_replica_is_chosen(loads: list[tuple[int, int]], chosen: int | None) -> None:
    assert least_loaded(Load(index, *load) for index, load in enumerate(loads)) == chosen


def test_the_order_in_which_loads_are_listed_does_not_matter() -> None:
    loads = [Load(0, 2, 5), Load(1, 3, 1), Load(2, 3, 4)]
    assert {least_loaded(order) for order in (loads, loads[::-1], [loads[1], loads[2], loads[0]])} == {2}


def _placed(*seats: Seat, tasks: int) -> list[int]:
    """The replica that each of so many tasks starts on, -1 for those that wait; no worker looks before all came."""
    scheduler = Scheduler(64, list(seats), clock=Clock())
    awake: list[Seat] = []
    for seat in seats:
        seat.wake = functools.partial(awake.append, seat)
    sent = [make_task() for _ in range(tasks)]
    submit(scheduler, *sent)
    while awake:
        seat = awake.pop(0)
        while scheduler.next_for(seat) is not None:
            pass
    scheduler.check_integrity()
    return [next((seat.index for seat in seats if task.id in seat.running), -1) for task in sent]


@pytest.mark.parametrize("replicas", [1, 2, 3, 8])
@pytest.mark.parametrize("slots", [1, 4])
def test_n_tasks_land_on_n_different_idle_equal_replicas(replicas: int, slots: int) -> None:
    assert _placed(*(Seat(i, slots, ready=True) for i in range(replicas)), tasks=replicas) == list(range(replicas))


def test_tasks_fill_unequal_replicas_level_by_level() -> None:
    assert _placed(Seat(0, 1, ready=True), Seat(1, 3, ready=True), tasks=5) == [1, 1, 0, 1, -1]


def test_free_memory_decides_between_replicas_with_as_many_free_slots() -> None:
    small, large = Seat(0, 2, ready=True, free_bytes=8 * GIB), Seat(1, 2, ready=True, free_bytes=24 * GIB)
    assert _placed(small, large, tasks=4) == [1, 0, 1, 0]


def test_a_replica_that_is_not_ready_or_stalled_gets_nothing() -> None:
    seats = [Seat(0, 8, free_bytes=80 * GIB), Seat(1, 8, ready=True, stalled=True), Seat(2, 1, ready=True)]
    assert _placed(*seats, tasks=3) == [2, -1, -1]
    assert seats[0].busy == seats[1].busy == 0


def test_each_replica_gets_one_of_as_many_tasks_as_there_are_replicas_on_its_own_host() -> None:
    scheduler = make_scheduler(2, 2, 2)
    submit(scheduler, *(make_task() for _ in scheduler.seats))
    for seat in scheduler.seats:
        found = scheduler.next_for(seat)
        assert found is not None
        assert found[1] == seat.host
        assert scheduler.next_for(seat) is None
