"""Which devices each pool gets: GPUs by name, or a share of the machine's cores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engines.api import DeviceSpec
from orchd.errors import ConfigError
from orchd.machine.gpus import Gpu, named
from orchd.settings.config import PoolConfig


@dataclass(frozen=True)
class Device:
    """A device that gets a worker.

    Attributes:
        name: In health, metrics and messages: ``cpu``, ``cpu#1``, ``gpu:0``.
        spec: As an engine addresses it.
    """

    name: str
    spec: DeviceSpec


def gpu_index(name: str) -> int | None:
    """nvidia-smi's index of a device by its name; None for a CPU."""
    return int(name.removeprefix("gpu:")) if name.startswith("gpu:") else None


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
        match = named(name.removeprefix("gpu:"), gpus)
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
