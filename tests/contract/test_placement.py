"""Home profile, section 7: placement."""

from __future__ import annotations

import ctypes
import dataclasses
import random
from pathlib import Path
from typing import Any

import llama_cpp
import pytest

from engines.api import DeviceSpec, ModelSpec
from engines.llamacpp.engine import LlamaCppEngine
from orchd.errors import ConfigError
from orchd.queue.placement import Load, least_loaded
from orchd.settings.config import PoolConfig
from orchd.settings.sources import load
from testkit.harness import Running, serving, until
from tests.contract.forbidden import CONFIG_KEYS, words_in


async def busy(server: Running) -> list[int]:
    pools = (await server.request("GET", "/health")).json()["pools"]
    return [replica["busy"] for replica in pools[0]["replicas"]]


@pytest.mark.home("HOME-7.1")
async def test_tasks_go_where_most_slots_are_free(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path, pool={"devices": ["cpu", "cpu", "cpu"], "slots": 2}) as server:
        server.brake.hold()
        seen = []
        for _ in range(6):
            before = sum(await busy(server))
            await server.submit(max_tokens=2)

            async def placed(wanted: int = before + 1) -> bool:
                return sum(await busy(server)) == wanted

            await until(placed, "the task is placed")
            seen.append(sorted(await busy(server)))
    assert seen == [[0, 0, 1], [0, 1, 1], [1, 1, 1], [1, 1, 2], [1, 2, 2], [2, 2, 2]]


@pytest.mark.home("HOME-7.1")
def test_the_least_loaded_has_most_slots_then_most_memory() -> None:
    draw = random.Random(7)
    for _ in range(500):
        loads = [Load(i, draw.randrange(4), draw.randrange(4)) for i in range(draw.randrange(1, 6))]
        chosen = least_loaded(loads)
        free = [load for load in loads if load.free_slots]
        if not free:
            assert chosen is None
            continue
        best = max(free, key=lambda load: (load.free_slots, load.free_bytes, -load.index))
        assert chosen == best.index


@pytest.mark.home("HOME-7.2")
def test_placement_knows_slots_and_memory_and_nothing_else() -> None:
    assert [field.name for field in dataclasses.fields(Load)] == ["index", "free_slots", "free_bytes"]


@pytest.mark.home("HOME-7.2", "HOME-7.3")
def test_no_engine_or_pool_setting_names_topology_or_tensor_splits() -> None:
    names = [field.name for kind in (ModelSpec, DeviceSpec) for field in dataclasses.fields(kind)]
    names += PoolConfig.__struct_fields__
    assert words_in(" ".join(names)) == set()
    assert not {"split_mode", "main_gpu", "tensor_split", "n_gpu_layers"} & set(names)


@pytest.mark.home("HOME-7.2", "HOME-7.3")
@pytest.mark.parametrize("text", [text for text in CONFIG_KEYS if text.startswith("[[pools]]")])
def test_config_refuses_such_settings(tmp_path: Path, text: str) -> None:
    path = tmp_path / "orchd.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="unknown key"):
        load(config_path=path, flags={}, environ={}, cwd=tmp_path)


@pytest.mark.home("HOME-7.2")
def test_llama_cpp_is_never_told_of_numa(tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(llama_cpp, "llama_numa_init", told.append)
    model = LlamaCppEngine().load(ModelSpec(tiny_model_path, slots=1, ctx=64, batch=16), DeviceSpec("cpu", threads=1))
    model.close()
    assert told == []
    for file in Path("engines").resolve().rglob("*.py"):
        assert "llama_numa_init" not in file.read_text()


@pytest.mark.home("HOME-7.3")
@pytest.mark.parametrize("device", [DeviceSpec("cpu", threads=1), DeviceSpec("gpu", 3, threads=1)], ids=str)
def test_a_model_is_never_split(tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch, device: DeviceSpec) -> None:
    asked: list[tuple[int, int, bool]] = []

    def refuse(path: bytes, params: llama_cpp.llama_model_params) -> None:
        split = ctypes.cast(params.tensor_split, ctypes.c_void_p).value
        asked.append((params.split_mode, params.main_gpu, split is None))

    monkeypatch.setattr(llama_cpp, "llama_model_load_from_file", refuse)
    with pytest.raises(Exception, match="could not be loaded"):
        LlamaCppEngine().load(ModelSpec(tiny_model_path, slots=1, ctx=64, batch=16), device)
    assert asked == [(llama_cpp.LLAMA_SPLIT_MODE_NONE, device.ordinal if device.kind == "gpu" else -1, True)]
