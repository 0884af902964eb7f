"""What the log says of tasks: a line for each thing that happens to one, and nothing of what it is about."""

from __future__ import annotations

import logging
import re
import uuid
from pathlib import Path

import pytest

from testkit.harness import serving, until
from tests.http.listening import hear

SECRET = "the quick brown fox"


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.DEBUG, "orchd")
    return caplog


def said(log: pytest.LogCaptureFixture, of: str) -> list[str]:
    """Every line about a task or a pool, without what it begins with and without figures that measure time."""
    lines = [record.getMessage() for record in log.records if record.getMessage().startswith(f"{of} ")]
    return [re.sub(r"(?<=[ (])\d+\.\d+", "#", line.removeprefix(f"{of} ")) for line in lines]


async def test_a_task_is_accepted_started_and_ended(log: pytest.LogCaptureFixture, tiny_model_path: Path) -> None:
    async with serving(tiny_model_path, pool={"slots": 1}) as server:
        server.brake.hold()
        first = await server.submit(max_tokens=8)
        await server.started(1)
        second = await server.submit(prompt=SECRET, max_tokens=8, priority="batch")
        server.brake.release()
        await server.events(second)
    accepted, started, ended = said(log, f"task {second}")
    assert re.fullmatch(
        r"accepted: pool default, batch, \d+ prompt tokens, max_tokens 8; 0 ahead, start expected in \d+ ms", accepted
    )
    assert started == "started: default/0 on cpu#0.0, after # s"
    assert ended == "ended: length, 8 tokens in # s (# a second)"
    assert len(said(log, f"task {first}")) == 3
    assert SECRET not in log.text


async def test_a_cancelled_task_says_how_far_it_came(log: pytest.LogCaptureFixture, tiny_model_path: Path) -> None:
    async with serving(tiny_model_path, pool={"slots": 1}) as server:
        server.brake.hold()
        running, waiting = await server.submit(), await server.submit()
        await server.started(1)
        for task_id in (waiting, running):
            async with server.listen(task_id, path="?cancel_grace_s=0"):
                pass

        async def free() -> bool:
            return await server.busy() == 0

        await until(free, "the slot is free")
    assert said(log, f"task {waiting}")[-1] == "ended: cancelled, after # s in the queue"
    assert said(log, f"task {running}")[-1] == "ended: cancelled, 0 tokens in # s"


async def test_a_task_that_fails_says_with_what(log: pytest.LogCaptureFixture, tiny_model_path: Path) -> None:
    async with serving(tiny_model_path) as server:
        server.brake.hold()
        task_id = await server.submit()
        async with server.listen(task_id) as listener:
            await hear(listener, 1)
            server.brake.fail("out of luck")
            await hear(listener, 1)
    assert said(log, f"task {task_id}")[-1] == "ended: error (WORKER_RESET), 0 tokens in # s"


async def test_a_refusal_says_why_and_under_which_id(log: pytest.LogCaptureFixture, tiny_model_path: Path) -> None:
    task_id = str(uuid.uuid4())
    async with serving(tiny_model_path) as server:
        await server.post(task_id=task_id, prompt="x", max_tokens=100_000)
        await server.post(b'{"a word of a prompt": 1}')
        await server.post(prompt="x", max_tokens=100_000)
        task_id_again = await server.submit(task_id=str(uuid.uuid4()))
        await server.submit(task_id=task_id_again)
    [refused] = said(log, f"task {task_id}")
    assert refused.startswith("refused: INVALID_PARAMS: the prompt's ")
    [refused] = said(log, "task without an id")
    assert refused.startswith("refused: INVALID_PARAMS: the prompt's ")
    assert said(log, "a task") == ["was refused: INVALID_PARAMS"]
    assert "a word of a prompt" not in log.text
    assert "submitted again: it gets its first answer" in said(log, f"task {task_id_again}")


async def test_a_reload_says_what_serves_now_and_what_served_before(
    log: pytest.LogCaptureFixture, tiny_model_path: Path
) -> None:
    async with serving(tiny_model_path) as server:
        assert (await server.request("POST", "/v1/pools/default/reload")).status == 200
    assert said(log, "pool default")[-1] == "now serves tiny-llama (before: tiny-llama); reloaded in # s"
