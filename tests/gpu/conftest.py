"""The made-up driver, for every test that asks for it."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest

from testkit.nvml import FakeNvml
from testkit.synthetic_gguf import Shape, write


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    """A driver with a card of 24 GB and one of 12 GB."""
    return FakeNvml().install(monkeypatch)


@pytest.fixture(scope="session")
def synthetic_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as `testkit.synthetic_gguf` writes it, but small: the vocabulary is most of it."""
    shape = Shape(layers=2, width=256, heads=4, kv_heads=2, ff=512)
    return write(tmp_path_factory.mktemp("synthetic") / "small.gguf", shape, gguf.GGMLQuantizationType.Q4_K)
