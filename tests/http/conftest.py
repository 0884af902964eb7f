"""Models for servers with several pools."""

from __future__ import annotations

from pathlib import Path

import pytest

from testkit.tiny_gguf import write_tiny_llama


@pytest.fixture
def other_model(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "other.gguf", seed=1)
