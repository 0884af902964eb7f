"""Files that have been vetted and have served: what they need is remembered, so that the next start need not vet them.

A verdict is of one file on one machine by one build, and counts only while all of that is surely the same:
- The file: device, inode, size, time of last write and time of last change of every part. Nobody can set the last.
- The build: llama.cpp's libraries and the code that vets, by size and time.
- The shape: everything that vetting looks at.

What would not be safe, and is not done:
- Files on network and FUSE filesystems, whose times are another machine's word, or cached.
- Files changed within seconds before they were vetted: a second change may leave the same times.
- Checksums. They are there for damage that changes no times, so every load computes them.
- Refusals. They cost no more than the next try.
- Reloads. A load that ends the process would take other clients' streams along; at the start there are none.
- A verdict that has not held: it is taken away while it is used and comes back once the model serves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import secrets
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import platformdirs

from engines.api import Footprint, ModelSpec
from engines.gguf_files import parts
from orchd.settings.sources import user_folder

FOLDER = "vetted"
MOST_RECORDS = 64
STEADY_S = 10.0
"""How long before it is vetted a file must have been left alone. Timestamps may be as coarse as 2 s."""

LOCAL = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "zfs", "tmpfs", "overlay"})
"""Filesystems that change a file's times with the file."""

clock = time.time
"""Seconds since the epoch, as files' times are told; for tests."""

_NOT_OF_THE_SHAPE = ("path", "step_target_s", "lone_step_s")


class Vetted:
    """The memory of one account. Any thread.

    Args:
        build: What differs in every build of the engine.
        folder: Where it is kept; left out, the account's cache folder.
    """

    def __init__(self, build: Sequence[object], folder: Path | None = None) -> None:
        self._build = build
        found = user_folder(platformdirs.user_cache_path) if folder is None else folder
        self._folder = None if found is None else found / FOLDER

    def take(self, spec: ModelSpec) -> Footprint | None:
        """What is known of a file; it is forgotten until `keep` is called."""
        if (record := self._record(spec)) is None:
            return None
        try:
            with record.open("rb") as file:
                found = os.fstat(file.fileno())
                ours = found.st_uid == os.geteuid() and not stat.S_IMODE(found.st_mode) & 0o022
                known = json.load(file)
            record.unlink()
            return Footprint(**known) if ours else None
        except (OSError, ValueError, TypeError):
            return None

    def keep(self, spec: ModelSpec, footprint: Footprint) -> None:
        """Remember a file that serves, if that is safe. A full disk and the like only cost the next start a second."""
        if (record := self._record(spec)) is None:
            return
        with contextlib.suppress(OSError):
            record.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            temporary = record.with_name(f".{secrets.token_hex(8)}")
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with open(fd, "w", encoding="ascii") as file:
                json.dump(dataclasses.asdict(footprint), file)
            temporary.rename(record)
            for old in sorted(record.parent.glob("*.json"), key=lambda path: path.stat().st_mtime)[:-MOST_RECORDS]:
                old.unlink()

    def _record(self, spec: ModelSpec) -> Path | None:
        """Where a verdict on a file in a shape is kept; None where none may be."""
        try:
            found = [part.stat() for part in parts(spec.path)]
        except OSError:
            return None
        if self._folder is None or not all(map(_is_steady, found)):
            return None
        shape = {k: v for k, v in dataclasses.asdict(spec).items() if k not in _NOT_OF_THE_SHAPE}
        files = [(s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in found]
        key = json.dumps([self._build, os.uname(), shape, files], sort_keys=True)
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()}.json"


def _is_steady(found: os.stat_result) -> bool:
    """Whether a change of the file cannot leave it the same times."""
    changed_s = max(found.st_mtime_ns, found.st_ctime_ns) / 1e9
    return changed_s + STEADY_S <= clock() and _filesystem_of(found.st_dev) in LOCAL


def _filesystem_of(device: int) -> str | None:
    """Of a device number, such as ``ext4``; None where nobody can tell."""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    return next((kind for numbers, kind in _mounts() if numbers == wanted), None)


def _mounts() -> Iterator[tuple[str, str]]:
    """Device number and filesystem of everything mounted: proc(5), ``/proc/[pid]/mountinfo``."""
    with contextlib.suppress(OSError, IndexError, UnicodeDecodeError):
        for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
            before, _, after = line.partition(" - ")
            yield before.split()[2], after.split()[0]
