"""Where a task goes: most free slots, then most free memory, then the lowest index."""

from __future__ import annotations

import functools

import pytest

from orchd.queue.placement import Load, least_loaded
from orchd.queue.scheduler import Scheduler
from orchd.queue.slots import ReplicaSlots
from testkit.builders import Clock, make_task
from tests.queue.queueing import make_scheduler, submit

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


def _placed(*replicas: ReplicaSlots[str], tasks: int) -> list[int]:
    """The replica that each of so many tasks starts on, -1 for those that wait; no worker looks before all came."""
    scheduler = Scheduler(64, list(replicas), clock=Clock())
    awake: list[ReplicaSlots[str]] = []
    for slots in replicas:
        slots.wake = functools.partial(awake.append, slots)
    sent = [make_task() for _ in range(tasks)]
    submit(scheduler, *sent)
    while awake:
        slots = awake.pop(0)
        while scheduler.next_for(slots) is not None:
            pass
    scheduler.check_integrity()
    return [next((slots.index for slots in replicas if task.id in slots.running), -1) for task in sent]


def _replica(index: int, slots: int, *, free_bytes: int = 0) -> ReplicaSlots[str]:
    return ReplicaSlots(index, slots, ready=True, free_bytes=free_bytes, instance="model")


@pytest.mark.parametrize("replicas", [1, 2, 3, 8])
@pytest.mark.parametrize("slots", [1, 4])
def test_n_tasks_land_on_n_different_idle_equal_replicas(replicas: int, slots: int) -> None:
    assert _placed(*(_replica(i, slots) for i in range(replicas)), tasks=replicas) == list(range(replicas))


def test_tasks_fill_unequal_replicas_level_by_level() -> None:
    assert _placed(_replica(0, 1), _replica(1, 3), tasks=5) == [1, 1, 0, 1, -1]


def test_free_memory_decides_between_replicas_with_as_many_free_slots() -> None:
    small, large = _replica(0, 2, free_bytes=8 * GIB), _replica(1, 2, free_bytes=24 * GIB)
    assert _placed(small, large, tasks=4) == [1, 0, 1, 0]


def test_a_replica_that_is_not_ready_or_stalled_gets_nothing() -> None:
    replicas = [_replica(0, 8, free_bytes=80 * GIB), _replica(1, 8), _replica(2, 1)]
    replicas[0].ready, replicas[1].stalled = False, True
    assert _placed(*replicas, tasks=3) == [2, -1, -1]
    assert replicas[0].busy == replicas[1].busy == 0


def test_each_replica_gets_one_of_as_many_tasks_as_there_are_replicas_on_its_own_model() -> None:
    scheduler = make_scheduler(2, 2, 2)
    submit(scheduler, *(make_task() for _ in scheduler.replicas))
    for slots in scheduler.replicas:
        found = scheduler.next_for(slots)
        assert found is not None
        assert found[1] == slots.instance
        assert scheduler.next_for(slots) is None
