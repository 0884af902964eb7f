"""A task's states, its log of events, and how long it is kept."""

from __future__ import annotations

import array
import asyncio
import gc
import json
import sys
import tracemalloc
import uuid

import msgspec
import pytest

from engines.api import FinishReason, Prompt
from orchd.errors import WorkerReset
from orchd.queue.events import EventLog
from orchd.queue.tasks import TRANSITIONS, Task, TaskState, TaskStore
from orchd.schemas import Accepted, End, Message, Priority, Started, TaskRequest, Token
from testkit.builders import Clock, make_task

# --- states ----------------------------------------------------------------------------------------------------------


def _move(task: Task, to: TaskState) -> None:
    if to is TaskState.RUNNING:
        task.start()
    elif to is TaskState.ENDED:
        task.end(FinishReason.STOP)
    else:
        task._move(to)


def _accepted_task(state: TaskState = TaskState.WAITING) -> Task:
    task = make_task()
    task.accepted = Accepted(task_id=task.id, queue_position=3, predicted_start_ms=70, backoff_ms=0)
    if state is not TaskState.WAITING:
        _move(task, state)
    return task


LEGAL = {
    (TaskState.WAITING, TaskState.RUNNING),
    (TaskState.WAITING, TaskState.ENDED),
    (TaskState.RUNNING, TaskState.ENDED),
}


@pytest.mark.parametrize("state", TaskState)
@pytest.mark.parametrize("to", TaskState)
def test_only_the_moves_of_the_table_are_possible(state: TaskState, to: TaskState) -> None:
    task = _accepted_task(state)
    if (state, to) in LEGAL:
        _move(task, to)
        assert task.state is to
    else:
        with pytest.raises(RuntimeError, match=f"from {state.name} to {to.name}"):
            _move(task, to)
        assert task.state is state


def test_the_one_terminal_state_is_ended() -> None:
    assert set(TRANSITIONS) == set(TaskState)
    assert {state for state, onward in TRANSITIONS.items() if not onward} == {TaskState.ENDED}


def _events(log: EventLog) -> list[tuple[int, str, object]]:
    parsed = []
    for data in log.frames:
        lines = dict(line.split(": ", 1) for line in data.decode().strip().split("\n"))
        parsed.append((int(lines["id"]), lines["event"], json.loads(lines["data"])))
    return parsed


def test_a_task_writes_started_tokens_and_one_end() -> None:
    task = _accepted_task()
    task.start()
    task.reason("hm", 0)
    task.token("hello\n", 2)
    task.tokens_cached, task.tokens_out = 1, 3
    task.end(FinishReason.LENGTH, decode_ms=12)
    assert _events(task.log) == [
        (0, "started", {"queue_position": 3, "predicted_start_ms": 70}),
        (1, "token", {"r": "hm", "i": 0}),
        (2, "token", {"t": "hello\n", "i": 2}),
        (3, "end", {"tokens_in": 1, "tokens_cached": 1, "tokens_out": 3, "decode_ms": 12, "finish_reason": "length"}),
    ]
    assert task.log.size_bytes > sum(map(sys.getsizeof, task.log.frames))


def test_a_failed_task_says_why_in_its_end() -> None:
    task = _accepted_task()
    task.end(FinishReason.ERROR, error=WorkerReset("the step failed"))
    error = {"code": "WORKER_RESET", "message": "the step failed", "engine": "llamacpp"}
    expected = {
        "tokens_in": 1,
        "tokens_cached": 0,
        "tokens_out": 0,
        "decode_ms": 0,
        "finish_reason": "error",
        "error": error,
    }
    assert _events(task.log) == [(0, "end", expected)]


def test_a_sequence_is_urgent_if_the_task_is_interactive_and_its_seed_comes_from_its_id() -> None:
    task = make_task(Priority.BATCH, max_tokens=7, prompt="ab")
    sequence = task.sequence()
    assert (sequence.key, list(sequence.tokens), sequence.max_tokens) == (task.id, [97, 98], 7)
    assert not sequence.urgent
    assert make_task(Priority.INTERACTIVE).sequence().urgent
    assert sequence.sampling.seed == uuid.UUID(task.id).int & 0xFFFFFFFF


# --- the log ---------------------------------------------------------------------------------------------------------

STARTED = Started(queue_position=0, predicted_start_ms=0)
END = End(tokens_in=1, tokens_cached=0, tokens_out=0, decode_ms=0, finish_reason=FinishReason.STOP)


@pytest.mark.parametrize("event", [STARTED, Token(t="x", i=0), END])
def test_nothing_follows_an_end(event: Started | Token | End) -> None:
    log = EventLog()
    log.append(END)
    assert log.ended
    with pytest.raises(RuntimeError, match=r"^an event after the end of its task$"):
        log.append(event)
    assert len(log.frames) == 1


async def test_every_subscriber_is_told_once_of_all_that_came_together() -> None:
    log = EventLog()
    told: list[int] = []
    with log.subscribed(lambda: told.append(len(log.frames))), log.subscribed(lambda: told.append(-1)):
        log.append(STARTED)
        log.append(Token(t="x", i=0))
        assert told == [], "events that one callback adds are told together, after it"
        await asyncio.sleep(0)
        assert told == [2, -1]
        log.append(END)
        await asyncio.sleep(0)
        assert told == [2, -1, 3, -1]


async def test_who_has_left_is_not_told() -> None:
    log = EventLog()
    told: list[int] = []
    with log.subscribed(lambda: told.append(1)):
        log.append(STARTED)
    await asyncio.sleep(0)
    assert told == []


# --- the store -------------------------------------------------------------------------------------------------------


def make_store(
    clock: Clock, *, retention_s: float = 300, retained_bytes: int = 1 << 20, cancel_grace_s: float = 5
) -> TaskStore:
    return TaskStore(retention_s=retention_s, retained_bytes=retained_bytes, cancel_grace_s=cancel_grace_s, clock=clock)


def _ended(store: TaskStore, *, text: str = "") -> Task:
    task = _accepted_task()
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
    store.add(task := _accepted_task())
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


@pytest.mark.parametrize("to", [TaskState.RUNNING, TaskState.ENDED])
def test_a_task_that_no_longer_waits_has_forgotten_its_prompt(to: TaskState) -> None:
    task = make_task(Priority.BATCH, max_tokens=7, prompt="ab")
    task.accepted = Accepted(task_id=task.id, queue_position=0, predicted_start_ms=0, backoff_ms=0)
    digest = task.request.digest()
    _move(task, to)
    assert (task.request.prompt, len(task.tokens)) == (None, 0)
    assert (task.priority, task.request.max_tokens, task.digest) == (Priority.BATCH, 7, digest)


def test_a_digest_tells_requests_apart_and_not_how_they_were_written() -> None:
    requests = [
        TaskRequest(prompt="a"),
        TaskRequest(prompt="b"),
        TaskRequest(prompt="a", stop=("a",)),
        TaskRequest(prompt="a", priority=Priority.BATCH),
        TaskRequest(prompt="a", seed=0),
        TaskRequest(prompt="a", task_id=uuid.UUID(int=1)),
        TaskRequest(messages=(Message(role="user", content="a"),)),
        TaskRequest(messages=(Message(role="system", content="a"),)),
    ]
    assert len({request.digest() for request in requests}) == len(requests)
    written = b'{"priority":"interactive","prompt":"\\u0061","max_tokens":256}'
    assert msgspec.json.decode(written, type=TaskRequest).digest() == requests[0].digest()


def test_a_task_that_never_had_a_listener_is_not_abandoned() -> None:
    store = make_store(clock := Clock())
    store.add(_accepted_task())
    clock.now += 1000
    assert store.sweep() == []


@pytest.mark.parametrize("state", [TaskState.WAITING, TaskState.RUNNING])
def test_a_task_is_abandoned_once_when_its_last_listener_has_been_gone_for_the_grace(state: TaskState) -> None:
    store = make_store(clock := Clock())
    store.add(task := _accepted_task(state))
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
    store.add(task := _accepted_task())
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
    store.add(task := _accepted_task())
    store.join(task)
    store.leave(task)
    task.end(FinishReason.CANCELLED)
    store.note_end(task)
    clock.now += 10
    assert store.sweep() == []


def test_the_grace_of_several_tasks_runs_for_each_by_itself() -> None:
    store = make_store(clock := Clock())
    first, second = _accepted_task(), _accepted_task()
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


def test_a_forgotten_task_can_still_be_left() -> None:
    store = make_store(clock := Clock(), retention_s=1)
    task = _ended(store)
    store.join(task)
    clock.now += 2
    store.sweep()
    store.leave(task)
    clock.now += 10
    assert store.sweep() == []
