"""What is chosen by where a model computes, and why. The GPU's column follows from how backends work, not from figures.

The same on both, although measured on CPUs alone (docs/benchmarks.md tells what was tried): a cache of its own for each
slot, a pass of its own for a prompt's chunk, tokens chosen on the host.
"""

from __future__ import annotations

from typing import NamedTuple

from engines.api import DeviceSpec


class Choices(NamedTuple):
    """One column.

    Attributes:
        fills_first_batch: The first step has as many rows as one may have. A GPU takes memory for some kernels, and
            Vulkan compiles shaders, when they first run: not in the middle of work.
        tunes_threads: Whether small steps are worth waking all threads is found out. On a GPU they have next to nothing
            to do.
        copies_held: Of a slot that holds little, only that is copied, through host memory. On a CPU a token costs three
            times as much as with its whole slot (``python -m benchmarks.steps``); a GPU would send it over the bus and
            back.
    """

    fills_first_batch: bool
    tunes_threads: bool
    copies_held: bool


CPU = Choices(fills_first_batch=False, tunes_threads=True, copies_held=True)
GPU = Choices(fills_first_batch=True, tunes_threads=False, copies_held=False)  # untested on a card


def choices(device: DeviceSpec) -> Choices:
    """The column of a device."""
    return CPU if device.kind == "cpu" else GPU
