"""Where the suite for real GPUs runs, and how large its models are there.

``ORCHD_TEST_DEVICE`` names another device than ``gpu:0``; with ``cpu`` the suite can be tried out where there is no
GPU: what needs one is skipped then, and models are tiny. ``ORCHD_TEST_MODELS`` is a folder that keeps the models it
writes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pynvml
import pytest

from benchmarks.gpu.models import write_named
from engines.api import Footprint, ModelSpec
from engines.llamacpp.build import gpu_backend
from engines.llamacpp.vet import vet
from orchd.machine import devices, gpus, memory
from testkit.tiny_gguf import write_tiny_llama

DEVICE = os.environ.get("ORCHD_TEST_DEVICE", "gpu:0")
ON_GPU = DEVICE != "cpu"
os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # as nvidia-smi counts, for models in this process
GIB = 2**30


@dataclass(frozen=True)
class Models:
    """Files to be served.

    Attributes:
        first: The usual one.
        second: Of the same shape, with other weights.
    """

    folder: Path
    first: Path
    second: Path


def check_device() -> None:
    """Fail with what to do if the suite cannot run here."""
    if not ON_GPU:
        return
    if gpu_backend() is None:
        pytest.fail("llama.cpp was built for the CPU only: make BACKEND=cuda setup; or try with ORCHD_TEST_DEVICE=cpu")
    there = [f"gpu:{gpu.index}" for gpu in gpus.find_gpus()]
    if DEVICE not in there:
        pytest.fail(f"there is no {DEVICE} here (GPUs: {', '.join(there) or 'none'}); name one with ORCHD_TEST_DEVICE")


def synthetic(folder: Path, shape: str, kind: str, *, seed: int = 0) -> Path:
    """A model of a real size, written if it is not there yet."""
    return write_named(folder, f"{shape}-{kind}-{seed}")


def make_models(folder: Path) -> Models:
    """Two models of 1B in Q4_K; on a CPU two tiny ones."""
    kept = Path(os.environ.get("ORCHD_TEST_MODELS", folder))
    kept.mkdir(parents=True, exist_ok=True)
    if ON_GPU:
        return Models(kept, synthetic(kept, "1B", "Q4_K"), synthetic(kept, "1B", "Q4_K", seed=1))
    paths = [write_tiny_llama(kept / f"tiny-{name}.gguf") for name in "ab"]
    return Models(kept, *paths)


def free_bytes() -> int:
    """Of the device's memory now."""
    free = memory.free_bytes(DEVICE)
    assert free is not None
    return free


def ctx_that_fills(path: Path, slots: int, room: int) -> tuple[int, Footprint]:
    """Tokens a slot with which a model needs just under so many bytes, and what it needs then."""
    small, large = (vet(ModelSpec(path, slots=slots, ctx=ctx)) for ctx in (1024, 2048))
    per_token = (large.total - small.total) / 1024
    base = memory.need(small, 1, memory=DEVICE) - int(1.05 * per_token * 1024)
    ctx = int((room - base) / (1.05 * per_token)) // 256 * 256
    if ctx < 256:
        pytest.skip(f"{DEVICE} has too little room for {path.name}")
    return ctx, vet(ModelSpec(path, slots=slots, ctx=ctx))


def bytes_of_process(pid: int) -> int | None:
    """What NVML says that a process holds on the device; None where it does not say, as in some containers."""
    index = devices.gpu_index(DEVICE)
    pynvml.nvmlInit()
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
            if process.pid == pid and process.usedGpuMemory is not None:
                return int(process.usedGpuMemory)
    finally:
        pynvml.nvmlShutdown()
    return None
