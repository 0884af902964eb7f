"""Where the event loop's time goes while 16 clients stream from the tiny model, sampled by py-spy.

Sampling slows nothing down much but needs the right to trace another process: root, or a ptrace scope of 0.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

from benchmarks.compare import load, setup
from benchmarks.compare.servers import Running
from benchmarks.compare.workloads import Work

SECONDS = 8
_ROWS = 15
_FRAME = re.compile(r"^(?P<function>.+) \((?P<file>[^)]*?)(?::\d+)?\)$")


async def profile(server: Running, work: Work) -> dict[str, float]:
    """Share of the event loop's busy samples by the innermost function, the greatest first.

    `select` counts among them: leaving it, the loop waits for the interpreter's lock or for a core.

    Raises:
        SetupError: py-spy is missing or may not trace.
    """
    program = shutil.which("py-spy", path=str(Path(sys.executable).parent)) or shutil.which("py-spy")
    if program is None:
        raise setup.SetupError("py-spy is not installed; run: pip install -e '.[bench]'")
    with tempfile.TemporaryDirectory(prefix="orchd-bench-") as folder:
        raw = Path(folder, "stacks")
        async with load.background(server, lambda: work.task(16, 400), clients=16, settle_tokens=4):
            command = ["record", "--pid", str(server.pid), "--duration", str(SECONDS), "--rate", "250", "--threads"]
            spy = await asyncio.create_subprocess_exec(
                program,
                *command,
                *("--format", "raw", "--output", str(raw)),
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
            )
            _, complaint = await spy.communicate()
        stacks = _read(raw)
        if spy.returncode or not stacks:
            raise setup.SetupError(f"py-spy could not trace the server: {complaint.decode(errors='replace').strip()}")
        return shares(stacks)


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def shares(stacks: str) -> dict[str, float]:
    """Of py-spy's raw stacks (``thread;outer;…;inner COUNT``) the main thread's innermost functions."""
    inner: Counter[str] = Counter()
    for line in stacks.splitlines():
        stack, _, count = line.rpartition(" ")
        frames = stack.split(";")
        if "MainThread" in frames[0]:
            inner[_name(frames[-1])] += int(count)
    total = sum(inner.values())
    return {name: count / total for name, count in inner.most_common(_ROWS)} if total else {}


def _name(frame: str) -> str:
    """`function (file)` with the file's path cut to what matters."""
    match = _FRAME.match(frame)
    if match is None:
        return frame
    file = match["file"].rpartition("site-packages/")[2].removeprefix(f"{setup.ROOT}/")
    return f"`{match['function']}` in {file}"
