"""What a pool's settings make of a model file, for `orchd serve` and `orchd check` alike."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engines.api import Footprint, ModelSpec
from orchd.cli import check
from orchd.pools.loading import model_spec
from orchd.settings.config import Config, PoolConfig

OTHER: dict[str, Any] = {
    "slots": 3,
    "ctx": 128,
    "batch": 64,
    "flash_attn": "on",
    "cache_type_k": "q8_0",
    "cache_type_v": "q4_0",
    "swa_full": True,
    "prompt_cache_mib": 7,
    "speculation": False,
    "mmap": False,
}
"""Another value than the default for every setting that changes what is loaded."""


def test_every_setting_that_shapes_a_model_is_listed_here() -> None:
    assert set(OTHER) == {field.name for field in fields(ModelSpec)} & set(PoolConfig.__struct_fields__)
    assert not [name for name, value in OTHER.items() if getattr(PoolConfig(), name) == value]


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
