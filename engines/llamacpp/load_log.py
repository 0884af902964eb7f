"""What llama.cpp says in its log while it loads: why it failed, and what it allocated. It tells nowhere else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from engines.errors import LoadFailed, OutOfDeviceMemory

_BUFFER_LINE = re.compile(r"(\S+)\s+(model|KV|RS|compute|output) buffer size\s*=\s*([\d.]+) MiB")
_OUT_OF_MEMORY = re.compile(r"out of memory|failed to allocate|unable to allocate|cudaMalloc failed", re.IGNORECASE)
_PREFIX = re.compile(r"^\s*(?:\w+: )*(?:error loading model: )?(?:error loading model \w+: )?")


WARNING, ERROR = 3, 4


class Line(NamedTuple):
    """A line of llama.cpp's log; ``level`` is ggml's."""

    level: int
    text: str


def load_error(what: str, lines: Sequence[Line]) -> LoadFailed:
    """The most telling line of a failed load, as the error it stands for: the first of the gravest."""
    if any(_OUT_OF_MEMORY.search(line.text) for line in lines):
        return OutOfDeviceMemory(f"{what} does not fit in device memory; try fewer slots or a smaller ctx")
    for level in (ERROR, WARNING):
        for line in lines:
            if line.level == level and (reason := _PREFIX.sub("", line.text)):
                return LoadFailed(f"{what} could not be loaded: {reason}")
    return LoadFailed(f"{what} could not be loaded: llama.cpp gave no reason")


class Buffers:
    """Bytes that llama.cpp reports to have allocated, by where they are and what for (``KV``, ``compute``, ...)."""

    def __init__(self, lines: Sequence[Line]) -> None:
        found = (_BUFFER_LINE.search(line.text) for line in lines if "buffer size" in line.text)
        self._all = [(m[1], m[2], int(float(m[3]) * 2**20)) for m in found if m]

    @property
    def on_device(self) -> int:
        """All that is not in host memory."""
        return sum(size for place, _, size in self._all if not place.startswith("CPU") and not place.endswith("_Host"))

    def of(self, *kinds: str) -> int:
        """All of these kinds, wherever."""
        return sum(size for _, kind, size in self._all if kind in kinds)
