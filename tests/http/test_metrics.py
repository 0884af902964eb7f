"""``GET /metrics``: the closed list, and figures that add up."""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import shutil
from asyncio.subprocess import PIPE, STDOUT
from pathlib import Path

import pytest

from testkit.harness import Running, serving, until
from testkit.tiny_gguf import write_tiny_llama

POOL = {"engine", "engine_version", "pool_id"}
REPLICA = POOL | {"replica_id"}
SERIES = {
    "queue_depth": POOL | {"priority"},
    "tasks_enqueued_total": REPLICA | {"priority"},
    "tasks_rejected_total": {"engine", "reason"},
    "tokens_in_total": REPLICA,
    "tokens_out_total": REPLICA,
    "model_state": {"model_id", "state"},
}
"""On a CPU: the GPU's two have no samples there."""


async def _mixed_work(server: Running) -> int:
    """Tasks of every fate, at rest; returns how many were accepted."""
    for fields in ({"max_tokens": 5}, {"max_tokens": 7, "priority": "batch"}, {"prompt": "the river", "max_tokens": 1}):
        await server.run(**fields)
    assert (await server.post(b"{")).status == 400
    assert (await server.post(prompt="a", model_ref="nope")).status == 503
    server.brake.hold()
    running = await server.submit()
    await server.started(4)
    waiting = await server.submit(priority="batch")
    assert (await server.post(prompt="a")).status == 429
    async with server.listen(waiting):
        pass
    async with server.listen(running):
        pass

    async def idle() -> bool:
        return await server.busy() == 0 and await server.total("queue_depth") == 0

    await until(idle, "both are cancelled")
    server.brake.release()
    return 5


async def test_exactly_the_series_and_labels_of_the_contract(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path) as server:
        await server.run(max_tokens=4)
        samples = await server.metrics()
    assert {name: {label for label, _ in labels} for name, labels in samples} == SERIES
    version = importlib.metadata.version("llama-cpp-python")
    for _, labels in samples:
        values = dict(labels)
        assert values.get("engine", "llamacpp") == "llamacpp"
        assert values.get("engine_version", version) == version
        assert values.get("pool_id", "default") == "default"


async def test_it_is_the_text_format_with_help_and_type(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path) as server:
        answer = await server.request("GET", "/metrics")
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    lines = answer.body.decode().splitlines()
    kinds = dict(line.removeprefix("# TYPE ").split() for line in lines if line.startswith("# TYPE "))
    helped = {line.split()[2] for line in lines if line.startswith("# HELP ")}
    assert set(SERIES) <= set(kinds) <= set(SERIES) | {"gpu_utilization", "vram_used_bytes"}
    assert kinds.keys() == helped
    assert all((kind == "counter") == name.endswith("_total") for name, kind in kinds.items())


async def test_every_series_is_there_before_anything_happens(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path) as server:
        samples = await server.metrics()
    assert {name for name, _ in samples} == set(SERIES)
    assert {value for (name, _), value in samples.items() if name != "model_state"} == {0}
    for name in ("queue_depth", "tasks_enqueued_total"):
        labels = [dict(has) for sample, has in samples if sample == name]
        assert {label["priority"] for label in labels} == {"interactive", "batch"}
    reasons = {dict(has)["reason"] for name, has in samples if name == "tasks_rejected_total"}
    assert reasons == {"INVALID_PARAMS", "ADMISSION_REJECT", "POOL_UNREADY", "POOL_UNAVAILABLE", "INTERNAL"}


async def test_the_figures_add_up_after_mixed_work(tiny_model_path: Path) -> None:
    async with serving(
        tiny_model_path, pool={"slots": 1}, queue={"capacity": 1}, tasks={"cancel_grace_s": 0}
    ) as server:
        accepted = await _mixed_work(server)
        assert await server.total("tasks_enqueued_total") + await server.total("queue_depth") == accepted
        enqueued = {
            (replica, priority): await server.total("tasks_enqueued_total", replica_id=replica, priority=priority)
            for replica in ("", "0")
            for priority in ("interactive", "batch")
        }
        assert enqueued == {("", "interactive"): 0, ("", "batch"): 1, ("0", "interactive"): 3, ("0", "batch"): 1}
        rejected = {
            reason: await server.total("tasks_rejected_total", reason=reason)
            for reason in ("INVALID_PARAMS", "POOL_UNAVAILABLE", "ADMISSION_REJECT")
        }
        assert rejected == {"INVALID_PARAMS": 1, "POOL_UNAVAILABLE": 1, "ADMISSION_REJECT": 1}
        assert await server.total("tasks_rejected_total") == 3
        assert await server.total("tokens_in_total") == 2 + 2 + 3 + 2  # with <s>
        assert await server.total("tokens_out_total") == 5 + 7 + 1
        text = (await server.request("GET", "/metrics")).body.decode()
    for unwanted in ("_created", "python_", "process_", "_bucket", "_sum", "quantile"):
        assert unwanted not in text


async def test_accepted_is_enqueued_plus_waiting_at_every_moment(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path, pool={"slots": 1}) as server:
        server.brake.hold()
        for accepted in range(1, 9):
            await server.submit(max_tokens=4, priority="batch" if accepted % 2 else "interactive")
            if accepted > 4:
                server.brake.allow(3)
            samples = await server.metrics()
            seen = sum(v for (name, _), v in samples.items() if name in ("tasks_enqueued_total", "queue_depth"))
            assert seen == accepted


async def test_queue_depth_is_by_priority(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path, pool={"slots": 1}) as server:
        server.brake.hold()
        await server.submit()
        await server.started(1)
        for priority in ("batch", "interactive", "batch"):
            await server.submit(priority=priority)
        depth = [await server.total("queue_depth", priority=priority) for priority in ("interactive", "batch")]
    assert depth == [1, 2]


async def test_each_replica_counts_its_own(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path, pool={"devices": ["cpu", "cpu"], "slots": 1}) as server:
        server.brake.hold()
        tasks = [await server.submit(max_tokens=4) for _ in range(2)]
        await server.started(2)
        server.brake.release()
        for task in tasks:
            await server.events(task)
        tokens = [await server.total("tokens_out_total", replica_id=replica) for replica in ("0", "1")]
    assert tokens == [4, 4]


async def test_model_state_is_active(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path) as server:
        states = {
            state: await server.total("model_state", model_id="tiny-llama", state=state)
            for state in ("Active", "Retired")
        }
        assert await server.total("model_state") == 1
    assert states == {"Active": 1, "Retired": 0}


async def test_promtool_finds_nothing_to_say(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        missing = "promtool is not installed; on Debian and Ubuntu: sudo apt install prometheus"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(missing)
    odd = tmp_path / 'odd "name" \\ ü.gguf'  # a label value that wants escaping
    async with serving(write_tiny_llama(odd)) as server:
        await server.run(max_tokens=4)
        text = (await server.request("GET", "/metrics")).body
    check = await asyncio.create_subprocess_exec(promtool, "check", "metrics", stdin=PIPE, stdout=PIPE, stderr=STDOUT)
    said, _ = await asyncio.wait_for(check.communicate(text), 30)
    assert (check.returncode, said.decode()) == (0, "")


@pytest.mark.parametrize("accept", ["application/openmetrics-text", "text/html", "*/*"])
async def test_the_format_does_not_depend_on_accept(tiny_model_path: Path, accept: str) -> None:
    async with serving(tiny_model_path) as server:
        answer = await server.request("GET", "/metrics", headers={"Accept": accept})
    assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
