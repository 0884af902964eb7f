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
        first_rows: Rows of steps that are tried before there is work, after one with as many as a step may have. A GPU
            takes memory for some kernels when they first run, and Vulkan compiles their shaders: without these, some
            of the first steps took 20 to 40 s on a software device. The largest comes first: on one row and then two,
            llama.cpp's Vulkan backend crashed.
        tunes_threads: Whether small steps are worth waking all threads is found out. On a GPU they have next to nothing
            to do.
        copies_held: Of a slot that holds little, only that is copied, through host memory. On a CPU a token costs three
            times as much as with its whole slot (``python -m benchmarks.steps``); a GPU would send it over the bus and
            back.
        solo_chunk: Prompt tokens in a step of one sequence, where texts must not depend on others. It cannot follow
            from how long steps take. 64 are a tile of llama.cpp's attention on a CPU.
    """

    first_rows: tuple[int, ...]
    tunes_threads: bool
    copies_held: bool
    solo_chunk: int


CPU = Choices(first_rows=(), tunes_threads=True, copies_held=True, solo_chunk=64)
GPU = Choices(  # untested on a card
    first_rows=(64, 32, 9, 8, 7, 6, 5, 4, 3, 2, 1), tunes_threads=False, copies_held=False, solo_chunk=512
)


def choices(device: DeviceSpec) -> Choices:
    """The column of a device."""
    return CPU if device.kind == "cpu" else GPU
