"""What llama.cpp says in its log while it loads: why it failed, and what it allocated. It tells nowhere else."""

from __future__ import annotations

import re

from engines.errors import LoadFailed, OutOfDeviceMemory

_BUFFER_LINE = re.compile(r"(\S+)\s+(model|KV|RS|compute|output) buffer size\s*=\s*([\d.]+) MiB")
_OUT_OF_MEMORY = re.compile(r"out of memory|failed to allocate|unable to allocate|cudaMalloc failed", re.IGNORECASE)
_PREFIX = re.compile(r"^\s*(?:\w+: )*(?:error loading model: )?(?:error loading model \w+: )?")


def load_error(what: str, lines: list[str]) -> LoadFailed:
    """The most telling line of a failed load, as the error it stands for."""
    for line in reversed(lines):
        if _OUT_OF_MEMORY.search(line):
            return OutOfDeviceMemory(f"{what} does not fit in device memory; try fewer slots or a smaller ctx")
    telling = [line for line in lines if "error" in line.lower() or "fail" in line.lower()]
    reason = _PREFIX.sub("", telling[0]) if telling else "llama.cpp gave no reason"
    return LoadFailed(f"{what} could not be loaded: {reason}")


class Buffers:
    """Bytes that llama.cpp reports to have allocated, by where they are and what for (``KV``, ``compute``, ...)."""

    def __init__(self, lines: list[str]) -> None:
        found = (_BUFFER_LINE.search(line) for line in lines)
        self._all = [(m[1], m[2], int(float(m[3]) * 2**20)) for m in found if m]

    @property
    def on_device(self) -> int:
        """All that is not in host memory."""
        return sum(size for place, _, size in self._all if not place.startswith(("CPU", "CUDA_Host")))

    def of(self, *kinds: str) -> int:
        """All of these kinds, wherever."""
        return sum(size for _, kind, size in self._all if kind in kinds)
