"""Waiting tasks: their order, whatever is taken out of the middle, and a heap that does not fill with the dead."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchd.queue.task_queue import TaskQueue
from orchd.queue.tasks import Task
from orchd.schemas import Priority
from testkit.builders import make_task

INTERACTIVE, BATCH = Priority.INTERACTIVE, Priority.BATCH


def filled(*tasks: Task) -> TaskQueue:
    queue = TaskQueue()
    for task in tasks:
        queue.push(task)
    return queue


@given(st.lists(st.tuples(st.sampled_from(Priority), st.sampled_from(["stays", "removed"]))), st.integers(0, 60))
def test_what_is_left_comes_out_by_priority_then_by_arrival(rows: list[tuple[Priority, str]], popped: int) -> None:
    tasks = [make_task(priority) for priority, _ in rows]
    queue = filled(*tasks)
    for task, (_, fate) in zip(tasks, rows, strict=True):
        if fate == "removed":
            queue.remove(task)
            queue.check_integrity()
    left = [task for task, (_, fate) in zip(tasks, rows, strict=True) if fate == "stays"]
    order = [task for priority in (INTERACTIVE, BATCH) for task in left if task.priority is priority]
    assert list(queue) == order
    popped = min(popped, len(order))
    assert [queue.pop() for _ in range(popped)] == order[:popped]
    queue.check_integrity()
    assert len(queue) == len(order) - popped
    assert queue.clear() == order[popped:]
    queue.check_integrity()
    assert not queue.depth[INTERACTIVE] + queue.depth[BATCH]


def test_batch_waits_behind_everything_interactive_only_behind_its_own() -> None:
    queue = filled(make_task(), make_task(BATCH), make_task(BATCH))
    assert queue.ahead_of(INTERACTIVE) == 1
    assert queue.ahead_of(BATCH) == 3


def test_a_task_is_found_by_its_id_while_it_waits() -> None:
    queue = filled(task := make_task())
    assert queue.get(task.id) is task
    queue.remove(task)
    assert queue.get(task.id) is None
    with pytest.raises(KeyError):
        queue.remove(task)
    with pytest.raises(IndexError):
        queue.pop()


def test_removed_tasks_do_not_pile_up() -> None:
    queue = TaskQueue()
    for _ in range(20):
        tasks = [make_task() for _ in range(500)]
        for task in tasks:
            queue.push(task)
        for task in tasks:
            queue.remove(task)
    assert len(queue._heap) <= 64


@pytest.mark.parametrize(
    ("tasks", "sizes"), [(300, [300, 149, 74, 36]), (131, [131, 65, 32]), (129, [129, 64]), (64, [64])]
)
def test_the_heap_is_rebuilt_only_where_it_is_large_and_most_of_it_is_gone(tasks: int, sizes: list[int]) -> None:
    queue = filled(*(waiting := [make_task() for _ in range(tasks)]))
    seen = [tasks]
    for task in waiting:
        queue.remove(task)
        seen.append(len(queue._heap))
    assert list(dict.fromkeys(seen)) == sizes
