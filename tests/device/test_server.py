"""The whole server over HTTP, with a replica on each device."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pynvml
import pytest

from engines.api import DeviceSpec, ModelSpec
from engines.llamacpp.engine import LlamaCppEngine
from engines.llamacpp.model import LlamaModel
from engines.llamacpp.vet import vet
from orchd.errors import ConfigError
from orchd.machine import memory
from testkit.harness import POOL, Running, text_of, until
from testkit.nvml import FakeNvml
from tests.device.rig import CTX, SLOTS, allocated, of_gpus, reload, replicas, serving
from tests.engines.test_leaks import resident_kib

pytestmark = [pytest.mark.device, pytest.mark.timeout(300)]

MIB = 2**20


async def run(server: Running, **fields: Any) -> tuple[str, str]:
    """A task's text and how it ended: its finish reason, or the code of its error."""
    events = await server.run(**{"max_tokens": 12, "ignore_eos": True, **fields})
    end = events[-1].data
    return text_of(events), end["error"]["code"] if "error" in end else end["finish_reason"]


@pytest.mark.usefixtures("nvml")
async def test_it_loads_on_both_devices_and_streams(models: Path) -> None:
    async with serving(models) as server:
        assert [(one["device"], one["alive"]) for one in await replicas(server)] == [("gpu:0", True), ("gpu:1", True)]
        events = await server.run(max_tokens=12, ignore_eos=True)
        assert [event.kind for event in events] == ["started", *["token"] * 12, "end"]


@pytest.mark.usefixtures("nvml")
async def test_sixteen_tasks_at_once_give_the_texts_they_give_alone(models: Path) -> None:
    prompts = [f"the river and the sea {n}" for n in range(16)]
    async with serving(models) as server:
        alone = [await run(server, prompt=prompt) for prompt in prompts[:4]]
        together = await asyncio.gather(*(run(server, prompt=prompt) for prompt in prompts))
    assert together[:4] == alone
    assert {end for _, end in together} == {"length"}
    assert len({text for text, _ in together}) > 8


@pytest.mark.usefixtures("nvml")
async def test_tasks_go_where_most_slots_are_free(models: Path) -> None:
    async with serving(models) as server:
        server.brake.hold()
        tasks = []
        for count in range(1, 2 * SLOTS + 1):
            tasks.append(await server.submit(max_tokens=2))
            await server.started(count)
            busy = [one["busy"] for one in await replicas(server)]
            assert (sum(busy), max(busy) - min(busy)) == (count, count % 2)
        server.brake.release()
        for task in tasks:
            assert (await server.events(task))[-1].kind == "end"


@pytest.mark.usefixtures("nvml")
async def test_who_hangs_up_frees_a_slot_and_its_cache_serves_on(models: Path) -> None:
    async with serving(models, devices=["gpu:0"], slots=1, cancel_grace_s=0) as server:
        before = await run(server)
        task = await server.submit(max_tokens=CTX - 32, ignore_eos=True)
        async with server.listen(task) as listener:
            async for event in listener:
                if event.kind == "token":
                    break
        assert await run(server) == before
        assert await server.busy() == 0


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nvml")
async def test_what_is_reported_is_what_the_device_gave(models: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """All but what kernels keep between steps. The first device also holds what llama.cpp exchanges with the host."""
    async with serving(models) as server:
        await run(server)
        held = await of_gpus(server, "vram_used_bytes")
        given = allocated(capfd.readouterr().err)
    assert held["gpu:0"] == held["gpu:1"] > MIB
    assert held["gpu:1"] == pytest.approx(given["Vulkan1"], rel=0.05)
    assert allocated(capfd.readouterr().err) == {"Vulkan0": 0, "Vulkan1": 0}


async def test_a_start_that_does_not_fit_is_refused_with_the_numbers(nvml: FakeNvml, models: Path) -> None:
    nvml.cards[1].used = nvml.cards[1].total - 256 * MIB
    with pytest.raises(ConfigError, match=r"a.gguf needs 0\.5\d GiB on gpu:1, but only 0\.25 GiB is free; use fewer"):
        async with serving(models):
            pass


async def test_a_reload_that_does_not_fit_is_refused_with_the_numbers(nvml: FakeNvml, models: Path) -> None:
    async with serving(models) as server:
        before = await run(server)
        nvml.cards[0].used = nvml.cards[0].total - 256 * MIB
        status, body = await reload(server, "b")
        assert (status, body["code"]) == (422, "RELOAD_FAILED")
        assert "on gpu:0, but only 0.25 GiB would be free without the current model" in body["message"]
        assert "a still serves" in body["message"]
        assert await run(server) == before


@pytest.mark.parametrize("beside", [True, False], ids=["beside the old one", "after the old one"])
async def test_a_cache_that_the_device_refuses_puts_the_old_model_back(
    nvml: FakeNvml, models: Path, beside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside: the driver shows room, the device gives no buffer of that size. After: the driver shows none for it."""
    loads: list[str] = []

    def load(engine: LlamaCppEngine, spec: ModelSpec, device: DeviceSpec, **more: Any) -> LlamaModel:
        loads.append(spec.path.stem)
        return LlamaModel(spec, device, **more)

    monkeypatch.setattr(LlamaCppEngine, "load", load)
    shape = {"slots": 16, "ctx": 2048}
    async with serving(models, **shape) as server:
        before = await run(server)
        if not beside:
            footprint = vet(ModelSpec(models / "wide.gguf", batch=POOL["batch"], **shape))  # type: ignore[arg-type]
            for card in nvml.cards:
                card.used = card.total - memory.need(footprint, 1, memory="gpu:0") + MIB
        status, body = await reload(server, "wide")
        assert (status, body["code"]) == (422, "RELOAD_FAILED")
        why = "does not fit in device memory" if beside else "is free; use fewer slots"
        assert why in body["message"]
        assert await run(server) == before
        assert [one["alive"] for one in await replicas(server)] == [True, True]
        assert loads.count("a") == (2 if beside else 4)


# --- reload ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nvml")
async def test_a_reload_under_load_loses_no_task(models: Path) -> None:
    async with serving(models) as server:
        stop = asyncio.Event()

        async def client(number: int) -> list[str]:
            ends = []
            while not stop.is_set():
                ends.append((await run(server, prompt=f"the sea {number}"))[1])
            return ends

        clients = [asyncio.create_task(client(number)) for number in range(6)]
        for name in ("b", "a", "b"):
            assert (await reload(server, name))[0] == 200
        stop.set()
        ends = [end for each in await asyncio.gather(*clients) for end in each]
    assert len(ends) >= 6
    assert set(ends) == {"length"}


@pytest.mark.usefixtures("nvml")
async def test_twenty_reloads_leave_the_memory_as_it_was(models: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Of the devices to the byte; the process holds the devices' memory and the shaders as well."""
    given, resident = [], []
    async with serving(models) as server:
        for number in range(20):
            assert (await reload(server, "ba"[number % 2]))[0] == 200
            assert (await run(server, max_tokens=2))[1] == "length"
            given.append(allocated(capfd.readouterr().err))
            resident.append(resident_kib())
    assert given[5]["Vulkan1"] == given[-1]["Vulkan1"] > 0
    assert resident[-1] - resident[5] < 8 * 1024


# --- trouble ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nvml")
async def test_a_step_that_fails_ends_that_replicas_tasks_and_no_others(models: Path) -> None:
    async with serving(models) as server:
        before = await run(server)
        server.brake.hold()
        tasks = [await server.submit(max_tokens=12, ignore_eos=True, prompt="the river") for _ in range(4)]
        await server.started(5)
        server.brake.fail("the device is gone")
        server.brake.release()
        ends = [(await server.events(task))[-1].data for task in tasks]
        codes = sorted(end["error"]["code"] if "error" in end else end["finish_reason"] for end in ends)
        assert codes == ["WORKER_RESET"] * 2 + ["length"] * 2
        assert [one["alive"] for one in await replicas(server)] == [True, True]
        assert [await run(server) for _ in range(2)] == [before] * 2


async def test_a_lost_gpu_gets_no_tasks_and_the_other_goes_on(nvml: FakeNvml, models: Path) -> None:
    async with serving(models) as server:
        nvml.cards[0].error = pynvml.NVML_ERROR_GPU_IS_LOST

        async def lost() -> bool:
            return [one["alive"] for one in await replicas(server)] == [False, True]

        await until(lost, "the replica is not alive")
        assert [(await run(server))[1] for _ in range(3)] == ["length"] * 3
        assert set(await of_gpus(server, "vram_used_bytes")) == {"gpu:1"}
