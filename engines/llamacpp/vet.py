"""Vets a model file: has a process that may die open it (`examination`), so that the one that serves does not.

Whatever comes of that process is a `Footprint` or a `LoadFailed`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engines.api import Footprint, ModelSpec, WaitCallback
from engines.errors import LoadFailed
from engines.llamacpp.examination import SHAPE, SLOWEST_READ, TIME_LIMIT_S, file_bytes

GIVE_WAY = 5
"""Nice value of the process beside the server's: where cores are few, running sequences come first."""

WAIT_S = 0.1
"""How often whoever waits for the process is asked whether to go on."""

_OWN_GROUP: dict[str, Any] = {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}
"""A Ctrl-C for the server says nothing about the file. A session of its own would say that too, but there Linux may
give it the same time as the whole server, whatever its nice value."""


def vet(
    spec: ModelSpec,
    *,
    time_limit_s: float | None = None,
    on_wait: WaitCallback | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Footprint:
    """What a model file needs in memory, after a throwaway process has opened it and decoded a few tokens.

    Whatever ends the wait for that process ends the process.

    Args:
        spec: The file and its shape.
        time_limit_s: How long it may take; left out, by the file's size.
        on_wait: See `engines.api.WaitCallback`.
        on_note: Is told what does not work, though the file can be served: one sentence without folders.

    Raises:
        LoadFailed: The file is not one that can be served; the message is one sentence without folders.
    """
    size = file_bytes(spec.path)
    limit_s = TIME_LIMIT_S + size / SLOWEST_READ if time_limit_s is None else time_limit_s
    try:
        return _vet(spec, size, limit_s, on_wait, on_note)
    except _Died:
        if spec.slots == 1:
            raise
        _vet(dataclasses.replace(spec, slots=1), size, limit_s, on_wait, None)
        raise LoadFailed(
            f"{spec.path.name} can only be served with slots = 1: llama.cpp ends where several of its tasks come and go"
        ) from None


class _Died(LoadFailed):
    """The process ended itself."""


def _vet(
    spec: ModelSpec,
    size: int,
    limit_s: float,
    on_wait: WaitCallback | None,
    on_note: Callable[[str], None] | None,
) -> Footprint:
    command = [sys.executable, "-m", "engines.llamacpp.examination", os.path.abspath(spec.path)]
    for field in SHAPE:
        command += [f"--{field.replace('_', '-')}", str(getattr(spec, field))]
    name = spec.path.name
    try:
        process = subprocess.Popen(
            command,
            cwd="/",  # where `-m` looks for modules first
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            **_OWN_GROUP,
        )
    except OSError as error:
        raise LoadFailed(f"{name} could not be vetted: no process could be started ({error.strerror})") from None
    with process:
        try:
            with contextlib.suppress(OSError):  # it has ended
                os.setpriority(os.PRIO_PROCESS, process.pid, os.getpriority(os.PRIO_PROCESS, 0) + GIVE_WAY)
            output = _output_of(process, limit_s, on_wait)
        except subprocess.TimeoutExpired:
            raise LoadFailed(f"{name} could not be opened within {limit_s:.0f} s") from None
        finally:
            process.kill()
    if process.returncode < 0:
        cause = _cause_of_death(-process.returncode)
        raise (LoadFailed if -process.returncode in _OF_THE_SYSTEM else _Died)(f"{name} {cause}")
    try:
        answer = json.loads(output.splitlines()[-1])
    except (ValueError, IndexError):
        raise LoadFailed(
            f"{name} could not be vetted: the process exited with {process.returncode} and no output"
        ) from None
    if not answer["ok"]:
        raise LoadFailed(_sentence(answer["error"], spec.path))
    if answer.get("note") and on_note is not None:
        on_note(_sentence(answer["note"], spec.path))
    return Footprint(weights=size, cache=answer["cache"], buffers=answer["buffers"], on_gpu=answer["on_gpu"])


def _sentence(said: str, path: Path) -> str:
    """What the process said, without folders and without what could drive a terminal."""
    said = said.replace(f"{os.path.abspath(path.parent)}/", "")
    return "".join(char if char.isprintable() else " " for char in said)


def _output_of(process: subprocess.Popen[bytes], limit_s: float, on_wait: WaitCallback | None) -> bytes:
    """What it prints until it ends. Raises `subprocess.TimeoutExpired`, and what ``on_wait`` raises."""
    deadline_s = time.monotonic() + limit_s
    while True:
        left_s = deadline_s - time.monotonic()
        try:
            return process.communicate(timeout=min(left_s, WAIT_S))[0]
        except subprocess.TimeoutExpired:
            if left_s <= WAIT_S:
                raise
            if on_wait is not None:
                on_wait()


_OF_THE_SYSTEM = (signal.SIGKILL, signal.SIGXCPU)


def _cause_of_death(number: int) -> str:
    if number == signal.SIGKILL:
        return "could not be vetted: the process was killed, probably because memory ran out"
    if number == signal.SIGXCPU:
        return "takes longer to open than any valid file"
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    return f"is damaged: opening it crashes llama.cpp with {name}"


def _environment() -> dict[str, str]:
    """What the process needs to start Python, and nothing of what the server knows."""
    kept = {key: os.environ[key] for key in ("PATH", "LD_LIBRARY_PATH", "LANG", "TMPDIR") if key in os.environ}
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(os.path.abspath(folder) for folder in sys.path),
        "OPENBLAS_NUM_THREADS": "1",  # numpy's, which has nothing to do here
        "CUDA_VISIBLE_DEVICES": "",
        "GGML_DISABLE_VULKAN": "1",
        "GGML_NO_BACKTRACE": "1",
    }
