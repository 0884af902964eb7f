"""How much more memory this process may take on its host: what is free, within control groups and rlimits.

Exceeding a control group's limit is not an error that can be caught: the kernel ends the process.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

PROC = Path("/proc")


def free_bytes(proc: Path = PROC) -> int | None:
    """The least that anything allows without swapping; None if nothing says.

    Args:
        proc: Where procfs is mounted. Control groups are looked for where its ``self/mountinfo`` says they are.
    """
    found = [*_available(proc), *_of_cgroups(proc), *_of_rlimits(proc)]
    return max(0, min(found)) if found else None


def _available(proc: Path) -> Iterator[int]:
    yield from (kib * 1024 for kib in _figures(proc / "meminfo", "MemAvailable:"))


def _of_rlimits(proc: Path) -> Iterator[int]:
    for limit, used in (("Max address space", "VmSize:"), ("Max data size", "VmData:")):
        for soft in _figures(proc / "self/limits", limit):  # none where it says "unlimited"
            yield from (soft - kib * 1024 for kib in _figures(proc / "self/status", used))


@dataclass(frozen=True)
class _Version:
    """What the files of a control group are called."""

    filesystem: str
    used: str
    limits: tuple[str, ...]
    cached: tuple[str, ...]  # lines of memory.stat: what the kernel takes back before it ends a process


_VERSION_1 = _Version(
    "cgroup", "memory.usage_in_bytes", ("memory.limit_in_bytes",), ("total_inactive_file", "total_active_file")
)
_VERSION_2 = _Version("cgroup2", "memory.current", ("memory.max", "memory.high"), ("inactive_file", "active_file"))


def _of_cgroups(proc: Path) -> Iterator[int]:
    """What each group allows, from the process's own up to the highest one that is visible from here."""
    mounts = [fields for line in _read(proc / "self/mountinfo").splitlines() if "-" in (fields := line.split())]
    for line in _read(proc / "self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        version = _VERSION_2 if number == "0" and not controllers else _VERSION_1
        if version is _VERSION_1 and "memory" not in controllers.split(","):
            continue
        for fields in mounts:
            filesystem, *_, options = fields[fields.index("-") + 1 :]
            if filesystem == version.filesystem and (version is _VERSION_2 or "memory" in options.split(",")):
                root, top = (re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), part) for part in fields[3:5])
                for folder in _folders(Path(top), root, path):
                    yield from _of_group(folder, version)


def _of_group(folder: Path, version: _Version) -> Iterator[int]:
    cached = sum(figure for name in version.cached for figure in _figures(folder / "memory.stat", name))
    for used in _figures(folder / version.used):
        for name in version.limits:
            yield from (limit - used + cached for limit in _figures(folder / name))  # none where it says "max"


def _folders(top: Path, root: str, path: str) -> Iterator[Path]:
    """A group's folder and those above it, where the group ``root`` of the hierarchy is mounted at ``top``."""
    try:
        below = PurePosixPath(path).relative_to(root)
    except ValueError:  # not below what is mounted: a container that sees its host's paths
        below = PurePosixPath()
    if ".." in below.parts:  # moved out of its namespace
        below = PurePosixPath()
    for part in (below, *below.parents) if below.parts else (below,):
        yield top / part


def _figures(file: Path, name: str = "") -> list[int]:
    """The number behind a name at the beginning of a line, or in a file that holds nothing else; one or none."""
    found = re.search(rf"^{re.escape(name)}\s*(\d+)", _read(file), re.MULTILINE)
    return [int(found[1])] if found else []


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, ValueError):
        return ""
