"""Whatever fails, on whichever replica: the old model serves as if nothing had been asked, and nothing is left open."""

from __future__ import annotations

import asyncio
import logging
import threading
from pathlib import Path

import pytest

from engines.api import Footprint
from engines.errors import DecodeFailed, LoadFailed, OutOfDeviceMemory
from orchd import memory
from orchd.errors import AdmissionReject, Code, PoolUnavailable, PoolUnready, ReloadFailed, ReloadInProgress
from orchd.tasks import TaskState
from tests.reload.stage import Hook, Stage, end_of, events_of, staged, text_of, until
from tests.support.fake_engine import Hang

GIB = 2**30
B_STEPS = [("vet", 0), ("vocab", 0), ("load", 0), ("load", 1)]
"""Every step of loading ``b`` on two replicas."""


def failing(at: str, name: str, replica: int = 0, *, error: Exception | None = None) -> Hook:
    def hook(step: str, model: str, index: int) -> None:
        if (step, model, index) == (at, name, replica):
            raise error or LoadFailed(f"{name}.gguf is bad at {step} {index}")

    return hook


def waiting(at: str, name: str, replica: int = 0) -> tuple[Hook, threading.Event, threading.Event]:
    """A hook that waits at a step, what tells that it is there, and what lets it go on."""
    there, go_on = threading.Event(), threading.Event()

    def hook(step: str, model: str, index: int) -> None:
        if (step, model, index) == (at, name, replica):
            there.set()
            assert go_on.wait(20)

    return hook, there, go_on


async def refused(stage: Stage, ref: str | None = "b", *, pool: str = "default") -> str:
    with pytest.raises(ReloadFailed) as caught:
        await stage.service.reload(pool, ref)
    message = str(caught.value)
    assert str(stage.folder) not in message
    assert "\n" not in message
    return message


async def undisturbed(stage: Stage, model: str = "a") -> None:
    """It serves on every replica, its state says so, and nothing is left of the attempt."""
    assert stage.serves == model
    assert stage.states()[model] == "Active"
    assert all(current is not None and not current.closes for current in stage.current())
    tasks = [await stage.submit("x") for _ in range(4)]
    await stage.ended(*tasks)
    first = ord("x") + {"a": 0, "b": 1000}[model]
    assert [text_of(task) for task in tasks] == [f"<{first}.0>"] * 4
    assert stage.service.health().status == "ok"
    await stage.check_leaks()


# --- a failure at each step


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
        assert stage.engine.steps == [("vet", "a", 0), ("vocab", "a", 0), ("load", "a", 0), ("load", "a", 1)]


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
        await until(lambda: stage.pool.away, "a leaves")
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
        assert "make room for another model" in end["error"]["message"]
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
        await until(lambda: stage.pool.away, "a leaves")
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
            "loading failed: a could not be taken down, because a worker hangs in a step; a was loaded again and serves"
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


# --- fit


async def test_a_model_that_does_not_fit_beside_the_old_one_comes_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with staged(tmp_path) as stage:
        stage.engine.footprint = Footprint(GIB, 0, 0)
        free = [GIB]
        monkeypatch.setattr(memory, "free_bytes", lambda place: free[0])
        a = stage.engine.of["a"]

        def hook(step: str, name: str, replica: int) -> None:
            if (step, name, replica) == ("load", "b", 0):
                assert [model.closes for model in a] == [1, 1]

        stage.engine.hook = hook
        assert stage.pool.model is not None
        object.__setattr__(stage.pool.model, "footprint", Footprint(GIB, 0, 0))
        reload = asyncio.create_task(stage.service.reload("default", "b"))
        await until(lambda: stage.pauses, "it waits for the memory to show")
        assert all(model.closes for model in a)
        free[0] = 3 * GIB
        await reload
        await undisturbed(stage, "b")


async def test_memory_that_never_shows_as_free_is_a_failed_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with staged(tmp_path, replicas=1) as stage:
        monkeypatch.setattr(memory, "free_bytes", lambda place: GIB)
        stage.engine.footprint = Footprint(GIB, 0, 0)
        assert stage.pool.model is not None
        object.__setattr__(stage.pool.model, "footprint", Footprint(GIB, 0, 0))
        message = await refused(stage)
        assert "b.gguf needs 1.30 GiB on cpu and 1.00 GiB are free" in message
        assert message.endswith("a was loaded again and serves")
        assert sum(stage.pauses) == pytest.approx(9)
        await undisturbed(stage)


@pytest.mark.parametrize("mode", ["auto", "replace"])
async def test_a_model_that_can_never_fit_is_refused_before_anything_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    async with staged(tmp_path, mode=mode) as stage:
        before = stage.current()
        monkeypatch.setattr(memory, "free_bytes", lambda place: 5 * GIB)
        stage.engine.footprint = Footprint(weights=2 * GIB, cache=GIB // 2, buffers=GIB // 4)
        message = await refused(stage)
        need = "6.02 GiB"  # 2.75 GiB twice, 5 % and 256 MiB more
        assert message == (
            f"loading failed: b.gguf needs {need} on cpu and 5.00 GiB are free; "
            "use fewer slots, a smaller ctx or a smaller model; a still serves"
        )
        assert stage.current() == before
        await undisturbed(stage)


async def test_where_nobody_can_tell_what_is_free_it_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with staged(tmp_path) as stage:
        monkeypatch.setattr(memory, "free_bytes", lambda place: None)
        stage.engine.footprint = Footprint(1 << 60, 0, 0)
        assert (await stage.service.reload("default", "b")).model_id == "b"


async def test_two_pools_do_not_count_on_the_same_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with staged(tmp_path, replicas=1, pools=("default", "other")) as stage:
        stage.engine.footprint = Footprint(GIB, 0, 0)
        taken = 0

        def free(place: str) -> int:
            return 2 * GIB - taken * GIB

        def hook(step: str, name: str, replica: int) -> None:
            nonlocal taken
            taken += step == "load"

        monkeypatch.setattr(memory, "free_bytes", free)
        stage.engine.hook = hook
        done = await asyncio.gather(
            stage.service.reload("default", "b"), stage.service.reload("other", "b"), return_exceptions=True
        )
        assert sorted(type(one).__name__ for one in done) == ["ReloadFailed", "Reloaded"]


# --- several things at once


async def test_a_second_reload_of_a_pool_is_refused_and_one_of_another_is_not(tmp_path: Path) -> None:
    async with staged(tmp_path, pools=("default", "other")) as stage:
        hook, there, go_on = waiting("vet", "b")
        stage.engine.hook = hook
        first = asyncio.create_task(stage.service.reload("default", "b"))
        await until(there.is_set, "the first is under way")
        with pytest.raises(ReloadInProgress):
            await stage.service.reload("default", "c")
        other = asyncio.create_task(stage.service.reload("other", "c"))
        go_on.set()
        assert (await first).model_id == "b"
        assert (await other).model_id == "c"
        assert stage.states() == {"a": "Retired", "b": "Active", "c": "Active"}
        await stage.check_leaks()


async def test_a_replica_that_is_down_comes_back_with_the_new_model(tmp_path: Path) -> None:
    async with staged(tmp_path, slots=1) as stage:
        down = stage.engine.of["a"][0]
        down.always = DecodeFailed("broken")
        stage.engine.hook = failing("load", "a", 0)  # and it stays down
        for _ in range(3):
            await stage.ended(await stage.submit("x"))
        await until(lambda: down.closes, "it is given up")
        await until(lambda: stage.service.health().status == "degraded", "it is told")
        assert (await stage.service.reload("default", "b")).model_id == "b"
        await undisturbed(stage, "b")
        stage.engine.hook = lambda *_: None
        pauses = len(stage.pauses)
        await asyncio.sleep(0.02)
        assert len(stage.pauses) <= pauses + 1, "nobody goes on bringing it back"
        await undisturbed(stage, "b")


async def test_a_replica_is_not_brought_back_with_a_file_that_was_never_vetted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with staged(tmp_path, replicas=1) as stage:
        (tmp_path / "a.gguf").write_bytes((tmp_path / "b.gguf").read_bytes())
        loads = len(stage.engine.models)
        stage.engine.of["a"][0].always = DecodeFailed("broken")
        for _ in range(3):
            await stage.ended(await stage.submit("x"))
        await until(lambda: len(stage.pauses) > 3, "it is tried")
        assert len(stage.engine.models) == loads
        assert "a.gguf was changed after it was vetted; reload it" in caplog.text
        assert (await stage.service.reload("default", None)).model_id == "a"
        await undisturbed(stage)


async def test_a_prompt_that_is_being_tokenised_gets_the_new_models_tokens(tmp_path: Path) -> None:
    async with staged(tmp_path, ctx=8192) as stage:
        there, go_on = threading.Event(), threading.Event()
        vocab = stage.engine.vocabs[0]
        tokenize = vocab.tokenize

        def slow(prompt: str) -> list[int]:
            tokens = tokenize(prompt)
            there.set()
            assert go_on.wait(20)
            return tokens

        vocab.tokenize = slow  # type: ignore[method-assign]
        prompt = "x" * 3000  # long enough for a thread
        submits = [asyncio.create_task(stage.submit(prompt)), asyncio.create_task(stage.submit(prompt, model_ref="a"))]
        await until(there.is_set, "it is being tokenised")
        await stage.service.reload("default", "b")
        go_on.set()
        task = await submits[0]
        await stage.ended(task)
        assert text_of(task) == f"<{1000 + ord('x')}.0>"
        with pytest.raises(PoolUnavailable, match="asked for 'a' and its pool now serves 'b'"):
            await submits[1]


async def test_tasks_that_wait_are_tokenised_again_and_pinned_ones_are_refused(tmp_path: Path) -> None:
    async with staged(tmp_path, gated=True, slots=1, ctx=4096) as stage:
        running = [await stage.submit("x") for _ in range(2)]
        await until(lambda: all(task.state is TaskState.RUNNING for task in running), "they run")
        prompts = ["y", *(char * 1000 for char in "klmnop")]  # together too long for the event loop
        tasks = [await stage.submit(prompt) for prompt in prompts]
        pinned = await stage.submit("z", model_ref="a")
        stage.engine.gated = False
        await stage.service.reload("default", "b")
        await stage.ended(pinned)
        assert [kind for kind, _ in events_of(pinned)] == ["end"]
        assert end_of(pinned)["error"] == {
            "code": "POOL_UNAVAILABLE",
            "message": "the task asked for 'a' and its pool now serves 'b'",
            "engine": "llamacpp",
        }
        for model in stage.engine.of["a"]:
            model.allow(1)
        await stage.ended(*running, *tasks)
        assert {text_of(task) for task in running} == {f"<{ord('x')}.0>"}
        assert [text_of(task) for task in tasks] == [f"<{1000 + ord(prompt[0])}.0>" for prompt in prompts]
        await until(lambda: all(model.closes for model in stage.engine.of["a"]), "the old one is closed")


# --- shutdown


@pytest.mark.parametrize(("step", "replica"), B_STEPS)
@pytest.mark.parametrize("mode", ["auto", "replace"])
async def test_a_reload_is_given_up_at_shutdown_and_leaves_nothing_open(
    tmp_path: Path, mode: str, step: str, replica: int
) -> None:
    async with staged(tmp_path, mode=mode) as stage:
        hook, there, go_on = waiting(step, "b", replica)
        stage.engine.hook = hook
        reload = asyncio.create_task(stage.service.reload("default", "b"))
        await until(there.is_set, "it is under way")
        await stage.service.drain(0)
        with pytest.raises(PoolUnready, match="shutting down"):
            await reload
        with pytest.raises(PoolUnready, match="shutting down"):
            await stage.service.reload("default", "b")
        go_on.set()
        await stage.idle_loader()
        await stage.check_leaks()


async def test_a_load_is_cut_short_at_shutdown(tmp_path: Path) -> None:
    async with staged(tmp_path) as stage:
        hook, there, go_on = waiting("load", "b")
        stage.engine.hook = hook
        reload = asyncio.create_task(stage.service.reload("default", "b"))
        await until(there.is_set, "it is under way")
        closing = asyncio.create_task(asyncio.to_thread(stage.pool.loader._loader.close))
        await until(lambda: stage.pool.loader._loader._closing, "the loader is told")
        go_on.set()
        await closing
        with pytest.raises(ReloadFailed, match="the server is shutting down"):
            await reload
        assert len(stage.engine.models) == 2, "its progress callback ended it"
        stage.idle_loader = _nothing  # type: ignore[method-assign]


async def _nothing() -> None: ...


async def test_a_caller_that_leaves_does_not_end_the_reload(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    async with staged(tmp_path) as stage:
        hook, there, go_on = waiting("load", "b")
        stage.engine.hook = hook
        reload = asyncio.create_task(stage.service.reload("default", "b"))
        await until(there.is_set, "it is under way")
        reload.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reload
        go_on.set()
        await until(lambda: stage.serves == "b", "it is done")
        await undisturbed(stage, "b")


async def test_out_of_memory_on_the_second_replica(tmp_path: Path) -> None:
    async with staged(tmp_path) as stage:
        stage.engine.hook = failing("load", "b", 1, error=OutOfDeviceMemory("b.gguf does not fit in device memory"))
        assert "b.gguf does not fit in device memory (replica 1 on cpu#default1)" in await refused(stage)
        await stage.idle_loader()
        assert [model.closes for model in stage.engine.of["b"]] == [1]
        await undisturbed(stage)
