"""Whether a model fits beside what is there already: plain arithmetic over bytes."""

from __future__ import annotations

from collections.abc import Mapping

from engines.api import Footprint
from engines.errors import OutOfDeviceMemory
from orchd.machine import host_memory
from orchd.machine.devices import Device, gpu_index
from orchd.machine.gpus import free_gpu_bytes

HOST = "cpu"
"""Host memory: the machine's own, which all CPU workers and all prompt caches share."""

MARGIN_SHARE = 0.05
MARGIN_BYTES = 256 * 2**20
"""Kept free besides `MARGIN_SHARE` of the need: for fragmentation, and all else on the machine."""

CUDA_BYTES = 256 * 2**20
"""Kept free on a GPU besides: CUDA's own context for the process, and what kernels take for a moment. Neither is in any
report of llama.cpp's, and CUDA that finds no memory in the middle of a step ends the process."""


def need(footprint: Footprint, replicas: int, *, memory: str = HOST) -> int:
    """Bytes that ``replicas`` replicas of a model should find free on the device they share."""
    total = taken(footprint, memory=memory) * replicas
    return total + int(total * MARGIN_SHARE) + MARGIN_BYTES + (CUDA_BYTES if memory != HOST else 0)


def needs(footprint: Footprint, replicas: Mapping[str, int], *, prompt_cache: int) -> dict[str, int]:
    """Bytes that a pool should find free, by memory.

    Args:
        footprint: Of its model.
        replicas: How many of them are in which memory.
        prompt_cache: Bytes of host memory for its prompts, on whatever devices it is.
    """
    found = {memory: need(footprint, count, memory=memory) for memory, count in replicas.items()}
    if prompt_cache:
        found[HOST] = found.get(HOST, MARGIN_BYTES) + prompt_cache
    return found


def taken(footprint: Footprint, *, memory: str = HOST) -> int:
    """Bytes that a model takes there."""
    return footprint.total + (footprint.on_gpu if memory != HOST else 0)


def check_fit(
    name: str, needs: Mapping[str, int], free: Mapping[str, int | None], *, leaving: Mapping[str, int] | None = None
) -> None:
    """Raise `OutOfDeviceMemory`, with the numbers, unless every device has what it needs.

    Args:
        name: The model.
        needs: Bytes by device.
        free: Bytes by device; None where nobody can tell, and then it is tried.
        leaving: Bytes by device that will be free as well, once another model is gone.
    """
    for device, wanted in needs.items():
        there, more = free[device], (leaving or {}).get(device, 0)
        if there is not None and wanted > there + more:
            free_when = "would be free without the current model" if more else "is free"
            raise OutOfDeviceMemory(
                f"{name} needs {gib(wanted)} on {device}, but only {gib(there + more)} {free_when}; {remedy(device)}"
            )


def remedy(memory: str) -> str:
    """What makes pools need less there."""
    prompt_cache = ", a smaller prompt_cache_mib" if memory == HOST else ""
    return f"use fewer slots, a smaller ctx{prompt_cache} or a smaller model"


def memory_of(device: Device) -> str:
    """The memory that a device uses: a GPU has its own, all CPU workers share the machine's."""
    return device.name if device.spec.kind == "gpu" else HOST


def free_bytes(memory: str) -> int | None:
    """Free memory there now; None if nobody can tell."""
    index = gpu_index(memory)
    return host_memory.free_bytes() if index is None else free_gpu_bytes(index)


def gib(size: int) -> str:
    """A number of bytes for people."""
    return f"{size / 2**40:.2f} TiB" if size >= 2**40 else f"{size / 2**30:.2f} GiB"
