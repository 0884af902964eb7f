"""A task's states and what it tells; what is left of it once it no longer waits."""

from __future__ import annotations

import json
import sys
import uuid

import msgspec
import pytest

from engines.api import FinishReason
from orchd.errors import WorkerReset
from orchd.queue.events import EventLog
from orchd.queue.tasks import TRANSITIONS, TaskState
from orchd.schemas import Accepted, Message, Priority, TaskRequest
from testkit.builders import make_task
from tests.queue.states import accepted_task, move

LEGAL = {
    (TaskState.WAITING, TaskState.RUNNING),
    (TaskState.WAITING, TaskState.ENDED),
    (TaskState.RUNNING, TaskState.ENDED),
}


@pytest.mark.parametrize("state", TaskState)
@pytest.mark.parametrize("to", TaskState)
def test_only_the_moves_of_the_table_are_possible(state: TaskState, to: TaskState) -> None:
    task = accepted_task(state)
    if (state, to) in LEGAL:
        move(task, to)
        assert task.state is to
    else:
        with pytest.raises(RuntimeError, match=f"from {state.name} to {to.name}"):
            move(task, to)
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
    task = accepted_task()
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
    task = accepted_task()
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


@pytest.mark.parametrize("to", [TaskState.RUNNING, TaskState.ENDED])
def test_a_task_that_no_longer_waits_has_forgotten_its_prompt(to: TaskState) -> None:
    task = make_task(Priority.BATCH, max_tokens=7, prompt="ab")
    task.accepted = Accepted(task_id=task.id, queue_position=0, predicted_start_ms=0, backoff_ms=0)
    digest = task.request.digest()
    move(task, to)
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
