"""The NVIDIA GPUs and their driver, as NVML sees them, and which of them CUDA sees."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass

import pynvml

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU as NVML sees it.

    Attributes:
        index: nvidia-smi's index.
        uuid: NVIDIA's name for this very card.
        name: The product.
        memory_bytes: All of its memory.
        pci: Its PCI address as Linux writes it, such as ``0000:01:00.0``; empty if NVML does not say.
    """

    index: int
    uuid: str
    name: str
    memory_bytes: int
    pci: str = ""


@dataclass(frozen=True)
class Driver:
    """The NVIDIA driver.

    Attributes:
        version: Its own, such as ``580.65.06``.
        cuda_version: The newest CUDA that it runs, such as ``13.0``; empty if it does not say.
    """

    version: str
    cuda_version: str


def find_gpus() -> list[Gpu]:
    """Every GPU that the NVIDIA driver shows and that answers, in nvidia-smi's order; none without a driver."""
    with _nvml() as there:
        return [gpu for index in range(pynvml.nvmlDeviceGetCount()) if (gpu := _gpu(index))] if there else []


def _gpu(index: int) -> Gpu | None:
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        total = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
        name = pynvml.nvmlDeviceGetName(handle)
        return Gpu(index, pynvml.nvmlDeviceGetUUID(handle), name, total, _pci_address(handle))
    except pynvml.NVMLError as error:
        _log.warning("gpu:%d is skipped: NVML reports %s", index, error)
        return None


def _pci_address(handle: object) -> str:
    try:
        at = pynvml.nvmlDeviceGetPciInfo(handle)
    except pynvml.NVMLError:
        return ""
    return f"{at.domain:04x}:{at.bus:02x}:{at.device:02x}.0"  # a GPU is the first function of its device


def find_driver() -> Driver | None:
    """The driver; None where there is none."""
    with _nvml() as there:
        if not there:
            return None
        version = pynvml.nvmlSystemGetDriverVersion()
        try:
            number = int(pynvml.nvmlSystemGetCudaDriverVersion_v2())
        except pynvml.NVMLError:
            return Driver(version, "")
        return Driver(version, f"{number // 1000}.{number % 1000 // 10}")


def free_gpu_bytes(index: int) -> int | None:
    """Free memory of a GPU by nvidia-smi's index; None if the driver does not say."""
    try:
        with _nvml() as there:
            return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(index)).free) if there else None
    except pynvml.NVMLError:
        return None


@contextlib.contextmanager
def _nvml() -> Iterator[bool]:
    """NVML, for as long as it is needed; False if there is none to be had."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield False
        return
    try:
        yield True
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def visible(gpus: Sequence[Gpu], environ: Mapping[str, str]) -> list[Gpu]:
    """The GPUs that an already set ``CUDA_VISIBLE_DEVICES`` leaves, in its order; all if it is not set.

    Numbers are nvidia-smi's, as with ``CUDA_DEVICE_ORDER=PCI_BUS_ID``, whatever that variable says.
    """
    listed = environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return list(gpus)
    chosen: list[Gpu] = []
    for entry in (part.strip() for part in listed.split(",")):
        match = named(entry, gpus)
        if len(match) != 1:
            break  # CUDA too stops at the first entry it does not know
        if match[0] not in chosen:
            chosen.append(match[0])
    return chosen


def named(key: str, gpus: Sequence[Gpu]) -> list[Gpu]:
    """The GPUs that a number, a UUID or the beginning of one (at least 4 digits of it) can mean."""
    if key.isdecimal() and len(key) < 4:
        return [gpu for gpu in gpus if key == str(gpu.index)]
    digits = key.upper().removeprefix("GPU-")
    return [gpu for gpu in gpus if len(digits) >= 4 and gpu.uuid.upper().removeprefix("GPU-").startswith(digits)]


def show_only(gpus: Sequence[Gpu], environ: MutableMapping[str, str]) -> None:
    """Make CUDA see exactly these GPUs, in this order. Must come before llama.cpp is loaded: CUDA reads this once.

    Vulkan is not told which: each model's GPU is found there by its PCI address.
    """
    environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpu.uuid for gpu in gpus)
    if not gpus:
        environ["GGML_DISABLE_VULKAN"] = "1"
