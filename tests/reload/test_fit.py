"""A model that may not fit beside the one it replaces."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from engines.api import Footprint
from orchd.machine import memory
from testkit.fake_engine import FakeModel
from tests.reload.faults import refused, undisturbed
from tests.reload.stage import staged, until

GIB = 2**30


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
        assert "b.gguf needs 1.30 GiB on cpu, but only 1.00 GiB is free" in message
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
            f"loading failed: b.gguf needs {need} on cpu, but only 5.00 GiB is free; "
            "use fewer slots, a smaller ctx, a smaller prompt_cache_mib or a smaller model; a still serves"
        )
        assert stage.current() == before
        await undisturbed(stage)


async def test_the_prompt_cache_counts_and_what_the_old_one_holds_is_free_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with staged(tmp_path, replicas=2, mode="replace", prompt_cache_mib=2048) as stage:
        monkeypatch.setattr(memory, "free_bytes", lambda place: 2 * GIB)
        stage.engine.footprint = Footprint(0, 0, 0)
        assert "b.gguf needs 2.25 GiB on cpu, but only 2.00 GiB is free" in await refused(stage)
        monkeypatch.setattr(FakeModel, "saved_bytes", GIB // 4)
        model = stage.pool.model
        assert model is not None
        await stage.pool.check_fit(model, leaving=model)


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
