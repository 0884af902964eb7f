"""The server under soak: a process, two pools on two shared CPU workers, and what it takes of the machine.

Beside them is a pool whose model is damaged and never comes up; now and then a worker is slow, or hangs; and at some
time whoever reads the log leaves.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from testkit import damaged_gguf
from testkit.process import Process, orchd_serve
from testkit.tiny_gguf import write_tiny_llama

POOLS = ("left", "right")
BROKEN_POOL = "broken"
GOOD = ("alpha", "beta")
CTX = 1024
CAPACITY = 6
STALL_S = 1.5
FAULTS: dict[str, Any] = {"SOAK_SLOW": "0.002", "SOAK_HANG": "0.0001", "SOAK_HANG_S": "4", "SOAK_SEED": "0"}
GIVE_BACK = signal.SIGUSR1
"""Has the server collect its garbage and return what was freed to the system, so that what is resident is what it
holds: what malloc keeps differs by 7 % from one look to the next."""
GRACE_S = 0.3
RETENTION_S = 15.0
"""For short runs, which wait for it twice. A client whose window was closed waits for the kernel's next probe, for 6 s
after 3 s of crawling, and must still find its task."""
LONG_RETENTION_S = 30.0

_CONFIG = """
[queue]
capacity = {capacity}
[workers]
stall_s = {stall}
[tasks]
cancel_grace_s = {grace}
retention_s = {retention}
"""
_POOL = """
[[pools]]
id = "{id}"
model = "{model}.gguf"
devices = ["cpu", "cpu"]
slots = 2
ctx = {ctx}
batch = 64
threads = 1
"""


@dataclass(frozen=True)
class Usage:
    """What a process holds.

    Attributes:
        threads: Of the kernel.
        files: Open descriptors.
        resident_kib: Memory, mapped files included.
    """

    threads: int
    files: int
    resident_kib: int

    @classmethod
    def of(cls, pid: int) -> Usage:
        status = Path(f"/proc/{pid}/status").read_text()
        resident = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert resident
        return cls(
            threads=len(os.listdir(f"/proc/{pid}/task")),
            files=len(os.listdir(f"/proc/{pid}/fd")),
            resident_kib=int(resident[1]),
        )


def write_models(folder: Path) -> tuple[str, ...]:
    """Write two good models of one vocabulary and size, and files that no reload may accept; returns their names."""
    for seed, name in enumerate(GOOD):
        write_tiny_llama(folder / f"{name}.gguf", seed=seed, eog_likely=True, name=name)
    good = (folder / "alpha.gguf").read_bytes()
    chance = random.Random(0)
    damaged = [
        *damaged_gguf.not_gguf(),
        *chance.sample(list(damaged_gguf.truncated(good, count=8)), 4),
        ("duplicate-tokens", damaged_gguf.duplicate_tokens(good)),
        ("wrong-architecture", damaged_gguf.wrong_architecture(good)),
    ]
    for name, content in damaged:
        (folder / f"bad-{name}.gguf").write_bytes(content)
    return tuple(f"bad-{name}" for name, _ in damaged)


@contextlib.contextmanager
def served(home: Path, *, retention_s: float) -> Iterator[tuple[Process, subprocess.Popen[bytes]]]:
    """The server on a free port, in a folder that holds the models, and the process that reads its log."""
    config = _CONFIG.format(capacity=CAPACITY, grace=GRACE_S, retention=retention_s, stall=STALL_S)
    pools = dict.fromkeys(POOLS, "alpha") | {BROKEN_POOL: "bad-duplicate-tokens"}
    (home / "orchd.toml").write_text(
        config + "".join(_POOL.format(id=pool, model=model, ctx=CTX) for pool, model in pools.items())
    )
    read, write = os.pipe()
    log = subprocess.Popen(["tee", "log"], cwd=home, stdin=read, stdout=subprocess.DEVNULL)
    os.close(read)
    try:
        with orchd_serve("--port", "0", home=home, stderr=write, module="tests.soak.faulty", **FAULTS) as process:
            os.close(write)
            yield process, log
    finally:
        log.kill()
        log.wait()
