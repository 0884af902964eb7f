"""A card of 24 GB and one of 12 GB: placement, fit, reload, metrics, and what happens when one of them is lost."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pynvml
import pytest

from engines.api import Footprint
from orchd.errors import ConfigError
from orchd.machine import memory
from testkit.harness import until
from testkit.nvml import GIB, FakeNvml
from tests.gpu.rig import CONTEXT_BYTES, OnGpus, quick, serving

__all__ = ["quick"]

SMALL = Footprint(weights=4 * GIB, cache=GIB, buffers=GIB // 4)
LARGE = Footprint(weights=7 * GIB, cache=GIB, buffers=GIB // 4)
HUGE = Footprint(weights=13 * GIB, cache=GIB, buffers=GIB // 4)
SIZES = {"small": SMALL, "large": LARGE, "huge": HUGE}


@pytest.fixture
def models(tmp_path: Path, tiny_model_path: Path) -> Path:
    """Files whose sizes are made up."""
    for name in SIZES:
        shutil.copy(tiny_model_path, tmp_path / f"{name}.gguf")
    return tmp_path


async def run(server: OnGpus) -> str:
    """A task from start to end; returns how it ended."""
    events = await server.run(max_tokens=2)
    return str(events[-1].data["finish_reason"])


# --- metrics ---------------------------------------------------------------------------------------------------------


async def test_each_replica_shows_what_it_holds_and_how_busy_its_card_is(nvml: FakeNvml, models: Path) -> None:
    nvml.cards[0].busy, nvml.cards[1].busy = 83, 7
    async with serving(nvml, SIZES, models / "small.gguf") as server:
        assert await server.of_gpus("vram_used_bytes") == {"gpu:0": SMALL.total, "gpu:1": SMALL.total}
        assert await server.of_gpus("gpu_utilization") == {"gpu:0": 0.83, "gpu:1": 0.07}
        labels = [dict(has) for name, has in await server.metrics() if name == "vram_used_bytes"]
        assert {frozenset(has) for has in labels} == {
            frozenset({"engine", "engine_version", "pool_id", "replica_id", "device"})
        }
        text = (await server.request("GET", "/metrics")).body.decode()
    [counted] = [line for line in text.splitlines() if line.startswith("# HELP vram_used_bytes ")]
    assert "weights, KV cache and compute buffers as llama.cpp reports them" in counted


async def test_what_replicas_hold_is_what_the_driver_shows_but_for_cudas_own(nvml: FakeNvml, models: Path) -> None:
    async with serving(nvml, SIZES, models / "large.gguf", devices=["gpu:1"]) as server:
        held = sum((await server.of_gpus("vram_used_bytes")).values())
        assert held + CONTEXT_BYTES == nvml.cards[1].used
        assert held == pytest.approx(nvml.cards[1].used, rel=0.1)


async def test_nvml_is_asked_once_a_second_however_often_metrics_are_scraped(nvml: FakeNvml, models: Path) -> None:
    async with serving(nvml, SIZES, models / "small.gguf") as server:
        nvml.calls.clear()
        nvml.threads.clear()
        began = time.monotonic()
        for _ in range(200):
            await server.metrics()
        seconds = time.monotonic() - began
        assert nvml.calls["nvmlDeviceGetUtilizationRates"] <= 2 * (1 + int(seconds))
        assert nvml.threads <= {"nvml"}


async def test_a_cpu_replica_has_no_samples_beside_a_gpu_that_has(nvml: FakeNvml, models: Path) -> None:
    async with serving(nvml, SIZES, models / "small.gguf", devices=["gpu:1"]) as server:
        assert set(await server.of_gpus("gpu_utilization")) == {"gpu:1"}


async def test_a_card_that_does_not_tell_its_load_still_shows_its_bytes(nvml: FakeNvml, models: Path) -> None:
    nvml.cards[0].busy = None
    async with serving(nvml, SIZES, models / "small.gguf") as server:
        assert set(await server.of_gpus("gpu_utilization")) == {"gpu:1"}
        assert set(await server.of_gpus("vram_used_bytes")) == {"gpu:0", "gpu:1"}


# --- placement -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("order", [["gpu:0", "gpu:1"], ["gpu:1", "gpu:0"]])
async def test_of_two_idle_cards_the_one_with_more_free_memory_is_chosen(
    nvml: FakeNvml, models: Path, order: list[str]
) -> None:
    async with serving(nvml, SIZES, models / "small.gguf", gated=True, devices=order) as server:
        await seen(server, nvml)
        await server.submit(max_tokens=2)
        await server.started(1)
        assert {replica["device"]: replica["busy"] for replica in await server.replicas()} == {"gpu:0": 1, "gpu:1": 0}
        await server.submit(max_tokens=2)  # now the other one has more free slots, and slots come first
        await server.started(2)
        assert {replica["device"]: replica["busy"] for replica in await server.replicas()} == {"gpu:0": 1, "gpu:1": 1}


@pytest.mark.usefixtures("quick")
async def test_memory_that_somebody_else_takes_counts(nvml: FakeNvml, models: Path) -> None:
    async with serving(nvml, SIZES, models / "small.gguf", gated=True) as server:
        nvml.cards[0].used = 23 * GIB
        await seen(server, nvml)
        await server.submit(max_tokens=2)
        await server.started(1)
        assert {replica["device"]: replica["busy"] for replica in await server.replicas()} == {"gpu:0": 0, "gpu:1": 1}
        nvml.cards[0].used = CONTEXT_BYTES + SMALL.total


async def seen(server: OnGpus, nvml: FakeNvml) -> None:
    """Wait until the server has looked at the cards as they are now, and acted on it."""
    looks = nvml.calls["nvmlDeviceGetMemoryInfo"]
    await until(lambda: nvml.calls["nvmlDeviceGetMemoryInfo"] > looks + 2 * len(nvml.cards), "NVML was asked")
    for _ in range(3):
        await server.request("GET", "/health")
    done = time.monotonic() + 0.05
    await until(lambda: time.monotonic() > done, "the readings were noted")


# --- fit -------------------------------------------------------------------------------------------------------------


async def test_a_model_that_does_not_fit_is_refused_at_the_start_with_the_numbers(nvml: FakeNvml, models: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"huge.gguf needs 15\.\d\d GiB on gpu:1, but only 12\.00 GiB is free; use fewer"
    ):
        async with serving(nvml, SIZES, models / "huge.gguf"):
            pass
    assert [card.used for card in nvml.cards] == [0, 0]


async def test_it_fits_on_the_larger_card_alone(nvml: FakeNvml, models: Path) -> None:
    async with serving(nvml, SIZES, models / "huge.gguf", devices=["gpu:0"]) as server:
        assert await server.of_gpus("vram_used_bytes") == {"gpu:0": HUGE.total}


async def test_memory_that_is_taken_already_is_not_counted_on(nvml: FakeNvml, models: Path) -> None:
    nvml.cards[0].used = 20 * GIB
    with pytest.raises(ConfigError, match=r"large.gguf needs 9\.\d\d GiB on gpu:0, but only 4\.00 GiB is free"):
        async with serving(nvml, SIZES, models / "large.gguf"):
            pass


def test_a_margin_is_left_for_cuda_itself() -> None:
    assert memory.need(SMALL, 1, memory="gpu:0") == memory.need(SMALL, 1) + memory.CUDA_BYTES
    assert memory.need(Footprint(0, 0, 0), 1, memory="gpu:0") > CONTEXT_BYTES


async def test_a_reload_loads_beside_the_old_model_where_both_fit(nvml: FakeNvml, models: Path) -> None:
    async with serving(nvml, SIZES, models / "small.gguf", devices=["gpu:0"], gated=True) as server:
        task = await server.submit(max_tokens=1)
        await server.started(1)
        answer = await server.request("POST", "/v1/pools/default/reload", new_model_ref="large")
        assert (answer.status, answer.json()["model_id"]) == (200, "large")
        assert await server.of_gpus("vram_used_bytes") == {"gpu:0": SMALL.total + LARGE.total}  # the old one still runs
        server.engine.models[0].allow(1)
        assert (await server.events(task))[-1].data["finish_reason"] == "length"
        await until(lambda: nvml.cards[0].used == CONTEXT_BYTES + LARGE.total, "the old one gave its memory back")
        assert await server.of_gpus("vram_used_bytes") == {"gpu:0": LARGE.total}


async def test_a_reload_takes_the_old_model_down_first_where_both_do_not_fit(nvml: FakeNvml, models: Path) -> None:
    async with serving(nvml, SIZES, models / "small.gguf", devices=["gpu:1"]) as server:
        answer = await server.request("POST", "/v1/pools/default/reload", new_model_ref="large")
        assert (answer.status, answer.json()["model_id"]) == (200, "large")
        assert nvml.cards[1].used == CONTEXT_BYTES + LARGE.total
        assert await run(server) == "length"


async def test_a_reload_that_can_never_fit_changes_nothing_and_says_the_numbers(nvml: FakeNvml, models: Path) -> None:
    async with serving(nvml, SIZES, models / "small.gguf") as server:
        answer = await server.request("POST", "/v1/pools/default/reload", new_model_ref="huge")
        assert answer.status == 422
        message = answer.json()["message"]
        assert "huge.gguf needs 15." in message
        assert "on gpu:1, but only 11." in message
        assert "small still serves" in message
        assert await run(server) == "length"
        assert [card.used for card in nvml.cards] == [CONTEXT_BYTES + SMALL.total] * 2


async def test_fifty_reloads_leave_the_memory_as_it_was(nvml: FakeNvml, models: Path) -> None:
    async with serving(nvml, SIZES, models / "small.gguf") as server:
        for number in range(50):
            name = ("large", "small")[number % 2]
            assert (await server.request("POST", "/v1/pools/default/reload", new_model_ref=name)).status == 200
        await until(
            lambda: [card.used for card in nvml.cards] == [CONTEXT_BYTES + SMALL.total] * 2, "all memory is back"
        )


# --- trouble ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
async def test_a_lost_gpu_loses_its_series_and_its_tasks_and_comes_back(nvml: FakeNvml, models: Path) -> None:
    async with serving(nvml, SIZES, models / "small.gguf") as server:
        nvml.cards[0].error = pynvml.NVML_ERROR_GPU_IS_LOST

        async def degraded() -> bool:
            return not (await server.replicas())[0]["alive"]

        await until(degraded, "the replica is not alive")
        health = await server.request("GET", "/health")
        assert (health.status, health.json()["status"]) == (200, "degraded")
        assert [replica["alive"] for replica in await server.replicas()] == [False, True]
        assert set(await server.of_gpus("gpu_utilization")) == {"gpu:1"}
        assert set(await server.of_gpus("vram_used_bytes")) == {"gpu:1"}
        for _ in range(4):
            assert await run(server) == "length"
        assert [len(model.admitted) for model in server.engine.models] == [0, 4]

        nvml.cards[0].error = None

        async def well() -> bool:
            return str((await server.request("GET", "/health")).json()["status"]) == "ok"

        await until(well, "it is back")
        assert set(await server.of_gpus("vram_used_bytes")) == {"gpu:0", "gpu:1"}
        assert await run(server) == "length"
        assert len(server.engine.models[0].admitted) == 1
        assert len(server.engine.models) == 2  # nothing was loaded anew


@pytest.mark.usefixtures("quick")
async def test_when_every_gpu_is_lost_nobody_is_left_without_an_answer(nvml: FakeNvml, models: Path) -> None:
    async with serving(nvml, SIZES, models / "small.gguf", gated=True, slots=1, devices=["gpu:1"]) as server:
        running = await server.submit(max_tokens=1)
        waiting = await server.submit(max_tokens=1)
        await server.started(1)
        nvml.cards[1].error = pynvml.NVML_ERROR_GPU_IS_LOST
        end = (await server.events(waiting))[-1]
        assert (end.kind, end.data["error"]["code"]) == ("end", "POOL_UNAVAILABLE")
        assert (await server.request("GET", "/health")).status == 503
        refused = await server.post(prompt="a")
        assert (refused.status, refused.json()["code"]) == (503, "POOL_UNAVAILABLE")
        assert await server.of_gpus("vram_used_bytes") == {}
        server.engine.models[0].allow(1)
        assert (await server.events(running))[-1].data["finish_reason"] == "length"  # what ran was let alone


@pytest.mark.usefixtures("quick")
async def test_a_reload_onto_a_lost_gpu_is_refused_and_says_so(nvml: FakeNvml, models: Path) -> None:
    async with serving(nvml, SIZES, models / "small.gguf") as server:
        nvml.cards[1].error = pynvml.NVML_ERROR_GPU_IS_LOST

        async def lost() -> bool:
            return not (await server.replicas())[1]["alive"]

        await until(lost, "the replica is not alive")
        answer = await server.request("POST", "/v1/pools/default/reload", new_model_ref="large")
        assert answer.status == 422
        assert "large.gguf cannot be loaded on gpu:1: NVML reports GPU is lost" in answer.json()["message"]
        assert len(server.engine.models) == 2


@pytest.mark.usefixtures("quick")
async def test_a_driver_that_does_not_answer_costs_the_series_alone(nvml: FakeNvml, models: Path) -> None:
    async with serving(nvml, SIZES, models / "small.gguf") as server:
        nvml.error = pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH  # the driver was updated underneath

        async def gone() -> bool:
            return not await server.of_gpus("gpu_utilization")

        await until(gone, "the series vanish")
        assert (await server.request("GET", "/metrics")).status == 200
        assert (await server.request("GET", "/health")).json()["status"] == "ok"
        assert await run(server) == "length"
