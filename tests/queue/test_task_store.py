"""How long tasks are kept, what they may take, and which count as abandoned."""

from __future__ import annotations

import array
import gc
import tracemalloc
import uuid

import msgspec
import pytest

from engines.api import FinishReason, Prompt
from orchd.queue.tasks import Task, TaskState, TaskStore
from orchd.schemas import Accepted, TaskRequest
from testkit.builders import Clock
from tests.queue.states import accepted_task


def make_store(
    clock: Clock, *, retention_s: float = 300, retained_bytes: int = 1 << 20, cancel_grace_s: float = 5
) -> TaskStore:
    return TaskStore(retention_s=retention_s, retained_bytes=retained_bytes, cancel_grace_s=cancel_grace_s, clock=clock)


def _ended(store: TaskStore, *, text: str = "") -> Task:
    task = accepted_task()
    store.add(task)
    task.start()
    task.token(text, 0)
    task.end(FinishReason.STOP)
    store.note_end(task)
    return task


def test_an_ended_task_is_kept_for_the_retention() -> None:
    store = make_store(clock := Clock())
    first = _ended(store)
    clock.now += 200
    second = _ended(store)
    clock.now += 99.9
    assert store.sweep() == []
    assert store.get(first.id) is first
    clock.now += 0.1
    store.sweep()
    assert store.get(first.id) is None
    assert store.get(second.id) is second
    clock.now += 200
    store.sweep()
    assert len(store) == 0
    assert store.ended_bytes == 0


def test_a_task_that_has_not_ended_is_kept_for_ever() -> None:
    store = make_store(clock := Clock())
    store.add(task := accepted_task())
    clock.now += 1e6
    assert store.sweep() == []
    assert list(store) == [task]


def test_what_ended_first_goes_first_when_events_take_too_much() -> None:
    store = make_store(Clock(), retained_bytes=30_000)
    tasks = [_ended(store, text="x" * 8000) for _ in range(5)]
    assert store.ended_bytes <= 30_000
    assert [store.get(task.id) is not None for task in tasks] == [False, False, True, True, True]


def test_the_newest_result_is_kept_even_if_it_alone_is_too_much() -> None:
    store = make_store(Clock(), retained_bytes=100)
    small, large = _ended(store), _ended(store, text="x" * 5000)
    assert store.get(small.id) is None
    assert store.get(large.id) is large


@pytest.mark.parametrize(("texts", "text"), [(0, ""), (200, " a"), (50, " river"), (3, "x" * 1000)])
def test_what_ended_tasks_are_counted_as_is_what_they_take(texts: int, text: str) -> None:
    store = make_store(Clock(), retained_bytes=1 << 40)
    _request(0)  # what is made once is made
    gc.collect()
    tracemalloc.start()
    try:
        for number in range(300):
            request = _request(number)
            task = Task(str(request.task_id), request, "default", Prompt(array.array("i", range(2000))))
            task.accepted = Accepted(task_id=task.id, queue_position=3000, predicted_start_ms=7000, backoff_ms=9000)
            store.add(task)
            task.start()
            for index in range(texts):
                task.token(text, index)
            task.end(FinishReason.STOP, decode_ms=2000)
            store.note_end(task)
        del request, task
        gc.collect()
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(store) == 300
    assert taken <= store.ended_bytes <= 1.2 * taken


def _request(number: int) -> TaskRequest:
    """As large as requests are, out of bytes as they come."""
    fields: dict[str, object] = {
        "task_id": str(uuid.UUID(int=number)),
        "prompt": f"{number} " * 5000,
        "stop": [f"stop {number}"] * 8,
    }
    fields |= {"pool_id": "default", "model_ref": "model" * 20, "temperature": 0.5 + number / 1000, "seed": 2**31}
    return msgspec.json.decode(msgspec.json.encode(fields), type=TaskRequest)


def test_a_task_that_never_had_a_listener_is_not_abandoned() -> None:
    store = make_store(clock := Clock())
    store.add(accepted_task())
    clock.now += 1000
    assert store.sweep() == []


@pytest.mark.parametrize("state", [TaskState.WAITING, TaskState.RUNNING])
def test_a_task_is_abandoned_once_when_its_last_listener_has_been_gone_for_the_grace(state: TaskState) -> None:
    store = make_store(clock := Clock())
    store.add(task := accepted_task(state))
    store.join(task)
    store.join(task)
    store.leave(task)
    clock.now += 100
    assert store.sweep() == []  # one still listens
    store.leave(task)
    clock.now += 4.9
    assert store.sweep() == []
    clock.now += 0.1
    assert store.sweep() == [task]
    clock.now += 100
    assert store.sweep() == []


def test_a_listener_that_comes_back_within_the_grace_saves_the_task() -> None:
    store = make_store(clock := Clock())
    store.add(task := accepted_task())
    store.join(task)
    store.leave(task)
    clock.now += 4
    store.join(task)
    clock.now += 100
    assert store.sweep() == []
    store.leave(task)
    clock.now += 4.9
    assert store.sweep() == []  # the grace began anew
    clock.now += 0.1
    assert store.sweep() == [task]


def test_a_listener_that_leaves_an_ended_task_cancels_nothing() -> None:
    store = make_store(clock := Clock())
    task = _ended(store)
    store.join(task)
    store.leave(task)
    clock.now += 10
    assert store.sweep() == []


def test_a_task_that_ends_during_the_grace_is_not_abandoned() -> None:
    store = make_store(clock := Clock())
    store.add(task := accepted_task())
    store.join(task)
    store.leave(task)
    task.end(FinishReason.CANCELLED)
    store.note_end(task)
    clock.now += 10
    assert store.sweep() == []


def test_the_grace_of_several_tasks_runs_for_each_by_itself() -> None:
    store = make_store(clock := Clock())
    first, second = accepted_task(), accepted_task()
    for task in (first, second):
        store.add(task)
        store.join(task)
    store.leave(second)
    clock.now += 2
    store.leave(first)
    clock.now += 3
    assert store.sweep() == [second]
    clock.now += 2
    assert store.sweep() == [first]


@pytest.mark.parametrize(("asked_s", "granted_s"), [(None, 5), (2, 2), (1000, 5)])
def test_the_last_to_leave_may_shorten_the_grace_and_not_lengthen_it(asked_s: float | None, granted_s: float) -> None:
    store = make_store(clock := Clock())
    store.add(task := accepted_task())
    store.join(task)
    assert not store.leave(task, grace_s=asked_s)
    clock.now += granted_s - 0.1
    assert store.sweep() == []
    clock.now += 0.1
    assert store.sweep() == [task]


@pytest.mark.parametrize(("configured_s", "asked_s"), [(5, 0), (0, None)])
def test_without_a_grace_the_last_to_leave_abandons_the_task_at_once(
    configured_s: float, asked_s: float | None
) -> None:
    store = make_store(clock := Clock(), cancel_grace_s=configured_s)
    store.add(task := accepted_task())
    store.join(task)
    store.join(task)
    assert not store.leave(task, grace_s=asked_s)  # one still listens
    assert store.leave(task, grace_s=asked_s)
    clock.now += 100
    assert store.sweep() == []  # once is enough


def test_a_forgotten_task_can_still_be_left() -> None:
    store = make_store(clock := Clock(), retention_s=1)
    task = _ended(store)
    store.join(task)
    clock.now += 2
    store.sweep()
    store.leave(task)
    clock.now += 10
    assert store.sweep() == []
