"""Two Vulkan devices, which a made-up driver shows as two GPUs: ``make test-device``."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest

from engines.llamacpp.native import gpus
from testkit.synthetic_gguf import Shape, write
from testkit.tiny_gguf import write_tiny_llama, write_tiny_swa


@pytest.fixture(scope="session", autouse=True)
def two_devices() -> None:
    """Fails where they are not there."""
    listed = list(gpus._vulkan_gpus())
    if len(listed) != 2:
        pytest.fail(f"llama.cpp sees {len(listed)} Vulkan devices in this process, not two; run: make test-device")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``a`` and ``b`` of one shape, a window ``swa``, and ``wide``, whose cache no buffer of these devices can hold."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("ab"):
        write_tiny_llama(folder / f"{name}.gguf", seed=seed)
    write_tiny_swa(folder / "swa.gguf")
    shape = Shape(layers=2, width=256, heads=4, kv_heads=4, ff=512)
    write(folder / "wide.gguf", shape, gguf.GGMLQuantizationType.Q4_K)
    return folder
