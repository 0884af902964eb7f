"""What else happens while a model is replaced: other reloads, lost replicas, prompts, a shutdown."""

from __future__ import annotations

import asyncio
import logging
import shutil
import threading
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path

import pytest

from engines.api import Prompt
from engines.errors import DecodeFailed
from orchd.errors import PoolUnavailable, PoolUnready, ReloadFailed, ReloadInProgress
from orchd.metrics import Metrics
from orchd.models.registry import RETIRED_KEPT
from orchd.queue.tasks import Task, TaskState
from orchd.schemas import Message
from tests.reload.faults import B_STEPS, failing, undisturbed, waiting
from tests.reload.stage import Vocab, end_of, events_of, staged, text_of, until


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

        def slow(prompt: str, *, at_most: int | None = None) -> list[int]:
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
        with pytest.raises(PoolUnavailable, match="asked for 'a', but its pool now serves 'b'"):
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
            "message": "the task asked for 'a', but its pool now serves 'b'",
            "engine": "llamacpp",
        }
        for model in stage.engine.of["a"]:
            model.allow(1)
        await stage.ended(*running, *tasks)
        assert {text_of(task) for task in running} == {f"<{ord('x')}.0>"}
        assert [text_of(task) for task in tasks] == [f"<{1000 + ord(prompt[0])}.0>" for prompt in prompts]
        await until(lambda: all(model.closes for model in stage.engine.of["a"]), "the old one is closed")


async def test_no_conversation_is_rendered_on_the_event_loop_however_fast_they_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One more comes in while each is rendered for the new model; in the end those that come have to wait."""
    async with staged(tmp_path, gated=True, slots=1, replicas=1, ctx=4096) as stage:
        running = await stage.submit("x")
        await until(lambda: running.state is TaskState.RUNNING, "it runs")
        loop, threads = asyncio.get_running_loop(), set()
        submits: list[asyncio.Task[Task]] = []

        async def send() -> None:
            submits.append(asyncio.create_task(stage.submit_messages((Message(role="user", content="y"),))))
            await until(lambda: submits[-1].done() or not stage.pool.takes_tasks.is_set(), "it is in, or has to wait")

        def render(self: Vocab, messages: Seq[Mapping[str, str]], **_: object) -> Prompt:
            threads.add(threading.current_thread())
            if self.name == "b" and stage.serves == "a" and len(submits) < 40:
                asyncio.run_coroutine_threadsafe(send(), loop).result(20)
            return Prompt(self.tokenize("y"))

        monkeypatch.setattr(Vocab, "tokenize_chat", render)
        await send()
        stage.engine.gated = False
        assert (await stage.service.reload("default", "b")).model_id == "b"
        for model in stage.engine.of["a"]:
            model.allow(1)
        tasks = await asyncio.gather(*submits)
        await stage.ended(running, *tasks)
        assert len(tasks) > 8
        assert {text_of(task) for task in tasks} == {f"<{1000 + ord('y')}.0>"}
        assert threading.main_thread() not in threads


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
        await stage.service.shut_down(0)
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


async def test_metrics_do_not_grow_with_every_reload(tmp_path: Path) -> None:
    async with staged(tmp_path) as stage:
        for number in range(12):
            shutil.copy(stage.folder / "b.gguf", stage.folder / f"model-{number}.gguf")
            await stage.service.reload("default", f"model-{number}")
        text = Metrics(stage.service, "0").render().decode()
        states = [line for line in text.splitlines() if line.startswith("model_state{")]
        assert len(states) == 2 * (1 + RETIRED_KEPT)
        assert 'model_state{model_id="model-11",state="Active"} 1.0' in states
