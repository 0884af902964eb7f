"""Whatever fails, on whichever replica: the old model serves as if nothing had been asked, and nothing is left open."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from engines.errors import LoadFailed, OutOfDeviceMemory
from orchd.errors import AdmissionReject, Code, PoolUnavailable, ReloadFailed
from orchd.pools.pool import PoolState
from orchd.queue.tasks import TaskState
from testkit.fake_engine import Hang
from tests.reload.faults import B_STEPS, failing, refused, undisturbed, waiting
from tests.reload.stage import end_of, staged, text_of, until


@pytest.mark.parametrize(("step", "replica"), B_STEPS)
@pytest.mark.parametrize("mode", ["auto", "replace"])
async def test_a_failure_at_any_step_on_any_replica_changes_nothing(
    tmp_path: Path, mode: str, step: str, replica: int
) -> None:
    async with staged(tmp_path, mode=mode) as stage:
        before = stage.current()
        stage.engine.hook = failing(step, "b", replica)
        message = await refused(stage)
        if step == "load":
            assert message.startswith(f"loading failed: b.gguf is bad at load {replica} (replica {replica} on cpu#")
        else:
            assert message.startswith(f"vetting failed: b.gguf is bad at {step} 0; a still serves")
        away = mode == "replace" and step == "load"
        assert message.endswith("; a was loaded again and serves" if away else "; a still serves")
        assert (stage.current() == before) is not away
        assert stage.states() == {"a": "Active"}
        await undisturbed(stage)

        stage.engine.hook = lambda *_: None
        assert (await stage.service.reload("default", "b")).model_id == "b"
        assert stage.states() == {"a": "Retired", "b": "Active"}
        await undisturbed(stage, "b")


@pytest.mark.parametrize("error", [RuntimeError("a defect"), MemoryError()])
@pytest.mark.parametrize(("step", "replica"), B_STEPS)
@pytest.mark.parametrize("mode", ["auto", "replace"])
async def test_not_even_a_defect_leaves_a_pool_without_its_model(
    tmp_path: Path, mode: str, step: str, replica: int, error: Exception
) -> None:
    async with staged(tmp_path, mode=mode) as stage:
        stage.engine.hook = failing(step, "b", replica, error=error)
        with pytest.raises(type(error)):
            await stage.service.reload("default", "b")
        await undisturbed(stage)


async def test_running_tasks_notice_nothing_of_a_reload_that_fails(tmp_path: Path) -> None:
    async with staged(tmp_path, gated=True, slots=1) as stage:
        running = [await stage.submit("x", max_tokens=5) for _ in range(2)]
        await until(lambda: all(task.state is TaskState.RUNNING for task in running), "they run")
        stage.engine.hook = failing("load", "b", 1)
        await refused(stage)
        for model in stage.engine.of["a"]:
            model.allow(5)
        await stage.ended(*running)
        assert {text_of(task) for task in running} == {"".join(f"<{ord('x')}.{i}>" for i in range(5))}


@pytest.mark.parametrize("step", ["vet", "vocab", "load"])
async def test_a_file_that_changes_meanwhile_is_refused(tmp_path: Path, step: str) -> None:
    """Nothing but what was vetted is opened in this process, however late it is replaced."""

    def replace(at: str, name: str, replica: int) -> None:
        if (at, name) == (step, "b"):
            new = tmp_path / "new"
            new.write_bytes((tmp_path / "b.gguf").read_bytes())
            new.replace(tmp_path / "b.gguf")

    async with staged(tmp_path) as stage:
        stage.engine.hook = replace
        assert "changed" in await refused(stage)
        loads = [taken for taken in stage.engine.steps if taken[:2] == ("load", "b")]
        assert len(loads) == (1 if step == "load" else 0)
        await undisturbed(stage)


async def test_a_message_has_no_folders_and_no_line_breaks(tmp_path: Path) -> None:
    async with staged(tmp_path) as stage:
        quoted = LoadFailed(f"failed to open\nGGUF file '{tmp_path}/b.gguf'")
        stage.engine.hook = failing("load", "b", error=quoted)
        assert "failed to open GGUF file 'b.gguf'" in await refused(stage)


async def test_the_first_load_is_vetted_as_well(tmp_path: Path) -> None:
    async with staged(tmp_path) as stage:
        vet, *rest = stage.engine.steps
        assert vet == ("vet", "a", 0)
        assert sorted(rest) == [
            ("load", "a", 0),
            ("load", "a", 1),
            ("vocab", "a", 0),
        ]  # the tokenizer beside the weights


# --- the old model leaves first


async def test_the_queue_accepts_while_there_is_no_model(tmp_path: Path) -> None:
    async with staged(tmp_path, mode="replace", gated=True) as stage:
        hook, there, go_on = waiting("load", "b")
        stage.engine.hook = hook
        reload = asyncio.create_task(stage.service.reload("default", "b"))
        await until(there.is_set, "b is being loaded")
        assert stage.service.health().status == "loading"
        assert stage.current() == [None, None]
        tasks = [await stage.submit("x") for _ in range(16)]
        with pytest.raises(AdmissionReject):
            await stage.submit("x")
        stage.engine.gated = False
        go_on.set()
        await reload
        await stage.ended(*tasks)
        assert [text_of(task) for task in tasks] == [f"<{1000 + ord('x')}.0>"] * 16
        await undisturbed(stage, "b")


async def test_running_tasks_have_the_grace_to_end(tmp_path: Path) -> None:
    async with staged(tmp_path, mode="replace", gated=True, slots=1) as stage:
        running = [await stage.submit("x", max_tokens=3) for _ in range(2)]
        await until(lambda: all(task.state is TaskState.RUNNING for task in running), "they run")
        late = await stage.submit("y")
        reload = asyncio.create_task(stage.service.reload("default", "b"))
        await until(lambda: stage.pool.state is PoolState.SWAPPED_OUT, "a leaves")
        stage.engine.gated = False
        for model in stage.engine.of["a"]:
            model.allow(3)
        await reload
        await stage.ended(late, *running)
        assert {end_of(task)["finish_reason"] for task in running} == {"length"}
        assert text_of(late) == f"<{1000 + ord('y')}.0>"


async def test_a_task_that_is_not_done_within_the_grace_ends_with_the_reason(tmp_path: Path) -> None:
    async with staged(tmp_path, mode="replace", grace_s=0.02, ctx=1 << 20) as stage:
        endless = await stage.submit("x", max_tokens=1_000_000)
        await until(lambda: endless.state is TaskState.RUNNING, "it runs")
        await stage.service.reload("default", "b")
        await stage.ended(endless)
        end = end_of(endless)
        assert end["finish_reason"] == "error"
        assert end["error"]["code"] == "DECODE_TIMEOUT"
        assert "had to unload the model" in end["error"]["message"]
        await undisturbed(stage, "b")


async def test_a_rollback_that_fails_too_is_told_and_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with staged(tmp_path, mode="replace", gated=True, slots=1) as stage:
        broken = True

        def hook(step: str, name: str, replica: int) -> None:
            if step == "load" and broken:
                raise LoadFailed(f"{name}.gguf is bad")

        running = [await stage.submit("x") for _ in range(2)]
        left = await stage.submit("y")
        stage.engine.hook = hook
        reload = asyncio.create_task(stage.service.reload("default", "b"))
        await until(lambda: stage.pool.state is PoolState.SWAPPED_OUT, "a leaves")
        for model in stage.engine.of["a"]:
            model.allow(2)
        with pytest.raises(ReloadFailed, match=r"b\.gguf is bad .*; a could not be loaded again either"):
            await reload
        await stage.ended(left, *running)
        assert end_of(left)["error"]["code"] == Code.POOL_UNAVAILABLE.value
        with pytest.raises(PoolUnavailable):
            await stage.submit("z")
        assert not stage.service.health().pools[0].ready
        assert stage.service.health().status == "degraded"
        stage.engine.gated = broken = False
        await until(lambda: stage.service.health().status == "ok", "both replicas come back")
        await undisturbed(stage)
        assert "a cannot be loaded again either: a.gguf is bad" in caplog.text


async def test_a_pool_that_lost_its_model_can_be_reloaded(tmp_path: Path) -> None:
    async with staged(tmp_path, mode="replace") as stage:
        stage.engine.hook = failing("load", "a")
        old, stage.engine.hook = stage.engine.hook, lambda step, name, replica: _no_loads(step)
        await refused(stage)
        stage.engine.hook = old  # a stays broken
        assert (await stage.service.reload("default", "b")).model_id == "b"
        assert stage.states() == {"a": "Retired", "b": "Active"}
        await undisturbed(stage, "b")


def _no_loads(step: str) -> None:
    if step == "load":
        raise LoadFailed("no")


async def test_a_worker_that_hangs_does_not_hold_up_a_reload_for_ever(tmp_path: Path) -> None:
    """The others get the old model back; the one that hangs, once it moves again."""
    async with staged(tmp_path, mode="replace", grace_s=0.01, stall_s=0.2, slots=1) as stage:
        hang = Hang()
        stuck_model = stage.engine.of["a"][0]
        stuck_model.step_faults.append(hang)
        stuck = await stage.submit("x", max_tokens=2)
        await asyncio.to_thread(hang.began.wait, 20)
        message = await refused(stage)
        assert message == (
            "loading failed: a could not be unloaded, because a worker hangs in a step; a was loaded again and serves"
        )
        assert [current is not None for current in stage.current()] == [False, True]
        task = await stage.submit("y")
        await stage.ended(task)
        assert text_of(task) == f"<{ord('y')}.0>"
        assert stuck.state is TaskState.RUNNING
        hang.release.set()
        await stage.ended(stuck)
        assert end_of(stuck)["error"]["code"] == Code.DECODE_TIMEOUT.value
        await until(lambda: stage.service.health().status == "ok", "it comes back")
        assert stuck_model.closes == 1
        await undisturbed(stage)


async def test_if_the_only_worker_hangs_those_who_wait_are_told(tmp_path: Path) -> None:
    async with staged(tmp_path, mode="replace", grace_s=0.01, stall_s=0.2, slots=1, replicas=1) as stage:
        hang = Hang()
        stage.engine.of["a"][0].step_faults.append(hang)
        stuck = await stage.submit("x")
        await asyncio.to_thread(hang.began.wait, 20)
        left = await stage.submit("y")
        await refused(stage)
        await stage.ended(left)
        assert end_of(left)["error"]["code"] == Code.POOL_UNAVAILABLE.value
        hang.release.set()
        await until(lambda: stage.service.health().status == "ok", "it comes back")
        await stage.ended(stuck)
        await undisturbed(stage)


async def test_out_of_memory_on_the_second_replica(tmp_path: Path) -> None:
    async with staged(tmp_path) as stage:
        stage.engine.hook = failing("load", "b", 1, error=OutOfDeviceMemory("b.gguf does not fit in device memory"))
        assert "b.gguf does not fit in device memory (replica 1 on cpu#default1)" in await refused(stage)
        await stage.idle_loader()
        assert [model.closes for model in stage.engine.of["b"]] == [1]
        await undisturbed(stage)
