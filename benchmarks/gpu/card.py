"""What a card is, and how fast its memory could be at most."""

from __future__ import annotations

import platform
from dataclasses import dataclass

import pynvml

from benchmarks.compare.setup import SetupError
from orchd.machine.devices import gpu_index


@dataclass(frozen=True)
class Card:
    """A GPU, or the CPU.

    Attributes:
        name: The product.
        bandwidth: Bytes a second between its memory and its cores, at most; 0 if it does not tell.
    """

    name: str
    bandwidth: float


def look_at(device: str) -> Card:
    """What NVML says of a device. Raises `SetupError` if it is not there."""
    index = gpu_index(device)
    if index is None:
        return Card(platform.processor() or platform.machine(), 0.0)
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        name = str(pynvml.nvmlDeviceGetName(handle))
    except pynvml.NVMLError as error:
        raise SetupError(f"{device} cannot be used: NVML says {error}") from None
    try:
        clock_mhz = pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_MEM)
        width_bits = pynvml.nvmlDeviceGetMemoryBusWidth(handle)
    except pynvml.NVMLError:
        return Card(name, 0.0)
    return Card(name, bandwidth(clock_mhz, width_bits))


def bandwidth(clock_mhz: int, width_bits: int) -> float:
    """Bytes a second: two transfers a clock, as GDDR and HBM do at the clock that NVML reports.

    A card with 10,501 MHz and 384 bits has 1,008 GB/s, one with 2,619 MHz and 5,120 bits 3,352 GB/s.
    """
    return 2 * clock_mhz * 1e6 * width_bits / 8
