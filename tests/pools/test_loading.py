"""What a pool makes of a model file: its shape, for `orchd serve` and `orchd check` alike, and its first load."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engines.api import DeviceSpec, Footprint, ModelSpec
from engines.errors import LoadFailed
from orchd.cli import check
from orchd.machine.devices import Device
from orchd.models import files, vetted
from orchd.models.active_model import VettedModel
from orchd.models.loader import Loader
from orchd.models.vetted import Vetted
from orchd.observer import Observer
from orchd.pools.loading import PoolLoader, model_spec
from orchd.settings.config import Config, PoolConfig
from testkit.fake_engine import FakeEngine
from testkit.observers import Quiet

OTHER: dict[str, Any] = {
    "slots": 3,
    "ctx": 128,
    "batch": 64,
    "flash_attn": "on",
    "cache_type_k": "q8_0",
    "cache_type_v": "q4_0",
    "swa_full": True,
    "prompt_cache_mib": 7,
    "speculate": False,
    "deterministic": True,
    "mmap": False,
}
"""Another value than the default for every setting that changes what is loaded."""


def test_every_setting_that_shapes_a_model_is_listed_here() -> None:
    assert set(OTHER) == {field.name for field in fields(ModelSpec)} & set(PoolConfig.__struct_fields__)
    assert not [name for name, value in OTHER.items() if getattr(PoolConfig(), name) == value]


def test_every_other_setting_has_a_use_of_its_own() -> None:
    """A setting that is in neither list would be read and dropped."""
    of_the_pool = {"id", "model", "devices", "threads", "reload"}
    assert set(PoolConfig.__struct_fields__) == set(OTHER) | of_the_pool


@pytest.mark.parametrize("name", OTHER)
def test_a_setting_arrives_in_what_is_loaded(name: str) -> None:
    spec = model_spec(PoolConfig(**{name: OTHER[name]}), Path("a.gguf"))
    assert getattr(spec, name) == OTHER[name]


def test_check_weighs_the_shape_that_serve_loads(monkeypatch: pytest.MonkeyPatch, tiny_model_path: Path) -> None:
    weighed: list[ModelSpec] = []

    def vet(spec: ModelSpec, **_: object) -> Footprint:
        weighed.append(spec)
        return Footprint(0, 0, 0)

    monkeypatch.setattr(check, "vet", vet)
    pool = msgspec.convert({**OTHER, "model": str(tiny_model_path), "devices": ["cpu"]}, PoolConfig)
    check.Checkup(Config(pools=(pool,)), {}, token_file=None).run()
    assert weighed == [model_spec(pool, tiny_model_path)]


@asynccontextmanager
async def remembering(
    path: Path, folder: Path, engine: FakeEngine, observer: Observer | None = None
) -> AsyncIterator[PoolLoader]:
    """What loads for one pool, at a start after one in which this file served."""
    loader = Loader(engine, observer or Quiet())
    pool = PoolLoader(
        PoolConfig(), [Device("cpu", DeviceSpec("cpu"))], loader, step_target_s=0.1, vetted=Vetted([], folder)
    )
    model, instances = await pool.load_first(path, room)
    pool.remember(VettedModel(model.id, path, model.footprint, model.fingerprint))  # type: ignore[arg-type]  # enough
    pool.discard(model)
    pool.discard_instances(instances)
    try:
        yield pool
    finally:
        await loader.beside(lambda: None)  # a tokenizer that nobody waited for is there by now
        await loader.run(lambda: None)  # and closed
        assert loader.close()


class Loaded(Quiet):
    """Counts models that are loaded."""

    def __init__(self) -> None:
        self.second = asyncio.Event()
        self._count = 0

    def loaded(self, label: str, seconds: float) -> None:
        self._count += 1
        if self._count == 2:
            self.second.set()


async def room(model: VettedModel) -> None:
    """There is always enough."""


@pytest.fixture
def old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One that has been left alone for a while."""
    ahead = time.time() + 60
    monkeypatch.setattr(vetted, "clock", lambda: ahead)
    monkeypatch.setattr(vetted, "_filesystem_of", lambda device: "ext4")
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(100))
    return path


async def test_a_remembered_file_is_loaded_beside_its_checksum(
    old_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Loaded()
    async with remembering(old_file, tmp_path / "cache", FakeEngine(), seen) as pool:
        computed = threading.Event()
        monkeypatch.setattr(files, "check_digest", lambda path, *, on_progress: computed.wait(20))
        loading = asyncio.create_task(pool.load_first(old_file, room))
        await asyncio.wait_for(seen.second.wait(), 20)
        assert not loading.done(), "it serves before its checksum is known"
        computed.set()
        model, instances = await loading
        pool.discard(model)
        pool.discard_instances(instances)


@pytest.mark.parametrize("load_fails", [False, True])
async def test_what_is_damaged_is_called_so_and_nothing_of_it_stays_open(
    old_file: Path, tmp_path: Path, load_fails: bool
) -> None:
    engine = FakeEngine()
    async with remembering(old_file, tmp_path / "cache", engine) as pool:
        old_file.with_name("m.gguf.sha256").write_text("0" * 64)
        if load_fails:
            engine.load_faults.append(LoadFailed("the model cannot be loaded"))
        with pytest.raises(LoadFailed, match="is damaged"):
            await pool.load_first(old_file, room)
    assert [model.closes for model in engine.models] == [1] * len(engine.models)
    assert [vocab.closes for vocab in engine.vocabs] == [1] * len(engine.vocabs)
