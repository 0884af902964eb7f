"""Which devices there are, and which of them each pool gets."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pynvml

from engines.api import DeviceSpec
from orchd.errors import ConfigError
from orchd.settings.config import PoolConfig

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
class Device:
    """A device that gets a worker.

    Attributes:
        name: In health, metrics and messages: ``cpu``, ``cpu#1``, ``gpu:0``.
        spec: As an engine addresses it.
    """

    name: str
    spec: DeviceSpec


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


def built_architectures(environment: Path | None = None) -> tuple[str, ...]:
    """Compute capabilities that the installed llama.cpp was compiled for, such as ``("86", "89")``.

    Empty for a build for the CPU, and for one that this project's CMakeLists.txt did not install.

    Args:
        environment: Folder of the virtual environment; this process's own by default.
    """
    try:
        built = (environment or Path(sys.prefix)).joinpath(".orchd-wheel.txt").read_text()
    except OSError:
        return ()
    found = re.search(r"-DCMAKE_CUDA_ARCHITECTURES=(\S+)", built)
    return tuple(name.partition("-")[0] for name in found[1].split(";")) if found else ()  # 86-real is for 86


def gpu_index(name: str) -> int | None:
    """nvidia-smi's index of a device by its name; None for a CPU."""
    return int(name.removeprefix("gpu:")) if name.startswith("gpu:") else None


def visible(gpus: Sequence[Gpu], environ: Mapping[str, str]) -> list[Gpu]:
    """The GPUs that an already set ``CUDA_VISIBLE_DEVICES`` leaves, in its order; all if it is not set.

    Numbers are nvidia-smi's, as with ``CUDA_DEVICE_ORDER=PCI_BUS_ID``, whatever that variable says.
    """
    listed = environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return list(gpus)
    chosen: list[Gpu] = []
    for entry in (part.strip() for part in listed.split(",")):
        match = _named(entry, gpus)
        if len(match) != 1:
            break  # CUDA too stops at the first entry it does not know
        if match[0] not in chosen:
            chosen.append(match[0])
    return chosen


def _named(key: str, gpus: Sequence[Gpu]) -> list[Gpu]:
    """The GPUs that a number, a UUID or the beginning of one (at least 4 digits of it) can mean."""
    if key.isdecimal() and len(key) < 4:
        return [gpu for gpu in gpus if key == str(gpu.index)]
    digits = key.upper().removeprefix("GPU-")
    return [gpu for gpu in gpus if len(digits) >= 4 and gpu.uuid.upper().removeprefix("GPU-").startswith(digits)]


def assign(
    pools: Sequence[PoolConfig], gpus: Sequence[Gpu], *, gpu_build: bool, cores: int, cpus: Sequence[int] = ()
) -> tuple[list[list[Device]], list[Gpu]]:
    """Devices for each pool, and the GPUs in the order of their CUDA ordinals.

    A name stands for the same device in every pool; the n-th ``cpu`` of one pool and the n-th of another share a
    worker. The machine's cores are divided among the CPU workers.

    Args:
        pools: With their ``devices``.
        gpus: The ones this process may use.
        gpu_build: Whether llama.cpp was built for GPUs.
        cores: Cores this process may use.
        cpus: The numbers of those cores, where computing on all of them leaves none to move to: see `crowded_cpus`.

    Raises:
        ConfigError: A pool names a GPU that is not there or cannot be used.
    """
    wanted = [_wanted(pool, gpus, gpu_build=gpu_build) for pool in pools]
    used = [gpu for gpu in gpus if any(gpu in entry for entry in wanted)]
    workers = max((entry.count(None) for entry in wanted), default=0)
    share = max(1, cores // max(1, workers))
    devices = []
    for pool, entry in zip(pools, wanted, strict=True):
        seen_cpus = 0
        mine = []
        threads = pool.threads or share
        for gpu in entry:
            if gpu is not None:
                mine.append(Device(f"gpu:{gpu.index}", DeviceSpec("gpu", used.index(gpu), threads, pci=gpu.pci)))
            else:
                name = "cpu" if workers == 1 else f"cpu#{seen_cpus}"
                own = tuple(cpus[seen_cpus * share : (seen_cpus + 1) * share])
                kept_on = own if 1 < threads == len(own) else ()
                mine.append(Device(name, DeviceSpec("cpu", threads=threads, cpus=kept_on)))
                seen_cpus += 1
        devices.append(mine)
    return devices, used


def _wanted(pool: PoolConfig, gpus: Sequence[Gpu], *, gpu_build: bool) -> list[Gpu | None]:
    """A pool's devices: a GPU, or None for the CPU."""
    if pool.devices == "auto":
        return list(gpus) if gpus and gpu_build else [None]
    wanted: list[Gpu | None] = []
    for name in pool.devices:
        if name == "cpu":
            wanted.append(None)
            continue
        match = _named(name.removeprefix("gpu:"), gpus)
        there = ", ".join(f"gpu:{gpu.index}" for gpu in gpus) or "none"
        if not match:
            raise ConfigError(f'pool "{pool.id}": there is no {name} (available: {there}); use one of them or "cpu"')
        if len(match) > 1:
            several = " and ".join(f"gpu:{gpu.index}" for gpu in match)
            raise ConfigError(f'pool "{pool.id}": {name} matches {several}; use more of the UUID')
        if not gpu_build:
            raise ConfigError(
                f'pool "{pool.id}": llama.cpp was built for the CPU only, so {name} cannot be used; '
                "rebuild it with: make BACKEND=cuda setup (for cards before the RTX 20 series: BACKEND=vulkan)"
            )
        if match[0] in wanted:
            raise ConfigError(f'pool "{pool.id}": {name} is listed twice; list it once and raise slots instead')
        wanted.append(match[0])
    return wanted


def show_only(gpus: Sequence[Gpu], environ: MutableMapping[str, str]) -> None:
    """Make CUDA see exactly these GPUs, in this order. Must come before llama.cpp is loaded: CUDA reads this once.

    Vulkan is not told which: each model's GPU is found there by its PCI address.
    """
    environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpu.uuid for gpu in gpus)
    if not gpus:
        environ["GGML_DISABLE_VULKAN"] = "1"


def usable_cores(cpus: Path = Path("/sys/devices/system/cpu")) -> int:
    """Physical cores this process may run on: two threads that share a core compute no faster than one.

    Args:
        cpus: Where the kernel tells which threads share a core; where it does not, every thread counts.
    """
    threads = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = set()
    for thread in threads:
        try:
            cores.add((cpus / f"cpu{thread}" / "topology" / "thread_siblings_list").read_text().strip())
        except OSError:
            cores.add(str(thread))
    return len(cores)


def crowded_cpus() -> tuple[int, ...]:
    """The CPUs this process may run on, if there is one for each of `usable_cores`; empty if there are more.

    Threads that compute on all of them are best kept where they are. The system would put two of them on one CPU while
    another program has theirs, and each would spin out its time there waiting for the other.
    """
    if not hasattr(os, "sched_getaffinity"):
        return ()
    cpus = sorted(os.sched_getaffinity(0))
    return tuple(cpus) if len(cpus) == usable_cores() else ()
