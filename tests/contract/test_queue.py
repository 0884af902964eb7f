"""Home profile, section 2: admission and scheduling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchd.errors import ConfigError
from orchd.queue.tasks import Task
from orchd.settings.sources import load
from testkit.harness import Running, serving, until
from testkit.live import Live
from testkit.openapi_check import operations, responses
from tests.contract.forbidden import CONFIG_KEYS, METHODS, REQUEST_FIELDS, RESUMABLE

ONE_SLOT: dict[str, Any] = {"pool": {"slots": 1}, "queue": {"capacity": 6}}


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of tasks in the order in which they left the queue; streams of their own would race."""
    order: list[str] = []
    start = Task.start

    def noted(task: Task) -> None:
        order.append(task.id)
        start(task)

    monkeypatch.setattr(Task, "start", noted)
    return order


async def finish(server: Running, ids: list[str]) -> None:
    server.brake.release()
    for task_id in ids:
        kinds = [event.kind for event in await server.events(task_id)]
        assert (kinds[0], kinds[-1]) == ("started", "end")


async def held(server: Running) -> str:
    """Hold the server with a task on its slot; returns the task."""
    server.brake.hold()
    task_id = await server.submit(max_tokens=2)
    await server.started(1)  # not only has a slot that waits for it
    return task_id


@pytest.mark.home("HOME-2.1")
async def test_the_queue_is_bounded(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path, **ONE_SLOT) as server:
        await held(server)
        answers = [await server.post(prompt="the", max_tokens=2) for _ in range(9)]
        depth = await server.total("queue_depth")
    assert [answer.status for answer in answers] == [202] * 6 + [429] * 3
    assert depth == 6


@pytest.mark.home("HOME-2.1")
@pytest.mark.parametrize("priority", ["high", "low", "normal", "Interactive", "", 0, 1, None, ["batch"]])
def test_there_is_no_third_priority(live: Live, priority: Any) -> None:
    assert live.post(priority=priority).status == 400


@pytest.mark.home("HOME-2.1")
@pytest.mark.parametrize("priority", ["interactive", "batch"])
def test_there_are_two_priorities(live: Live, priority: str) -> None:
    assert live.follow(live.submit(priority=priority, max_tokens=1))[-1][0] == "end"


@pytest.mark.home("HOME-2.2")
async def test_order_of_arrival_holds_inside_each_priority(tiny_model_path: Path, starts: list[str]) -> None:
    async with serving(tiny_model_path, **ONE_SLOT) as server:
        first = await held(server)
        sent = [
            (priority, await server.submit(priority=priority, max_tokens=2))
            for priority in ("batch", "interactive", "batch", "interactive", "interactive", "batch")
        ]
        await finish(server, [task_id for _, task_id in sent])
    interactive = [task_id for priority, task_id in sent if priority == "interactive"]
    batch = [task_id for priority, task_id in sent if priority == "batch"]
    assert starts == [first, *interactive, *batch]


@pytest.mark.home("HOME-2.3")
async def test_a_full_queue_rejects_and_drops_nothing(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path, **ONE_SLOT) as server:
        running = await held(server)
        waiting = [await server.submit(priority="batch", max_tokens=2) for _ in range(6)]
        for priority in ("interactive", "batch"):
            refusal = await server.post(prompt="the", priority=priority)
            assert (refusal.status, refusal.json()["code"]) == (429, "ADMISSION_REJECT")
        server.brake.release()
        ends = [(await server.events(task_id))[-1] for task_id in [running, *waiting]]
    assert {end.data["finish_reason"] for end in ends} == {"length"}


@pytest.mark.home("HOME-2.3")
def test_the_policy_is_documented() -> None:
    submit = next(operation for operation in operations() if operation.path == "/v1/tasks")
    assert "never dropped" in " ".join(submit.node["description"].split())
    assert "queue is full" in responses(submit)[429]["description"]
    page = Path(__file__).parents[2] / "docs" / "configuration.md"
    assert "when it is full, new tasks are refused (429) and none is dropped" in page.read_text()


@pytest.mark.home("HOME-2.4")
@pytest.mark.parametrize("field", REQUEST_FIELDS)
def test_a_task_can_ask_for_no_share_deadline_or_preemption(live: Live, field: str) -> None:
    answer = live.post(**{field: REQUEST_FIELDS[field]})
    assert answer.status == 400
    assert field in answer.json()["message"]


@pytest.mark.home("HOME-2.4")
@pytest.mark.parametrize("text", [text for text in CONFIG_KEYS if not text.startswith("[server]")])
def test_config_knows_nothing_of_them(tmp_path: Path, text: str) -> None:
    path = tmp_path / "orchd.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="unknown key"):
        load(config_path=path, flags={}, environ={}, cwd=tmp_path)


@pytest.mark.home("HOME-2.4")
async def test_nothing_that_runs_is_preempted(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path, **ONE_SLOT) as server:
        server.brake.hold()
        batch = await server.submit(priority="batch", max_tokens=30)
        await server.started(1)
        server.brake.allow(5)
        interactive = [await server.submit(max_tokens=1) for _ in range(3)]
        async with server.listen(interactive[0]) as listener:
            server.brake.release()
            assert (await anext(listener)).kind == "started"
            ended = await server.events(batch, last=0)
        assert [event.kind for event in ended] == ["token"] * (len(ended) - 1) + ["end"]
        assert ended[-1].data["tokens_out"] == 30
        assert await server.total("tasks_enqueued_total", priority="batch") == 1


@pytest.mark.home("HOME-2.4")
async def test_batch_tasks_get_no_fair_share(tiny_model_path: Path, starts: list[str]) -> None:
    async with serving(tiny_model_path, pool={"slots": 1}, queue={"capacity": 20}) as server:
        first = await held(server)
        batch = await server.submit(priority="batch", max_tokens=1)
        interactive = [await server.submit(max_tokens=1) for _ in range(18)]
        await finish(server, [batch, *interactive])
    assert starts == [first, *interactive, batch]


@pytest.mark.home("HOME-2.4")
async def test_a_cancelled_task_is_not_resumed(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path, tasks={"cancel_grace_s": 0}) as server:
        server.brake.hold()
        fields: dict[str, Any] = {"task_id": "6f1c9f0e-8a53-4f0b-9d0c-3a1f5c2b7e44", "prompt": "the", "max_tokens": 30}
        task_id = (await server.post(**fields)).json()["task_id"]
        async with server.listen(task_id) as listener:
            assert (await anext(listener)).kind == "started"
        await until(lambda: _idle(server), "the task is cancelled")
        server.brake.release()
        again = await server.post(**fields)
        assert again.json()["task_id"] == task_id
        events = await server.events(task_id)
    assert events[-1].data["finish_reason"] == "cancelled"


async def _idle(server: Running) -> bool:
    return await server.busy() == 0


@pytest.mark.home("HOME-2.4")
@pytest.mark.parametrize("path", RESUMABLE)
def test_there_are_no_routes_for_them(live: Live, path: str) -> None:
    assert {live.request(method, path).status for method in METHODS} == {404}
