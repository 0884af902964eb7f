"""Opens a model file in a process that may die, so that the one that serves does not.

``python -m engines.llamacpp.vet FILE [--slots N] [--ctx N] ...`` prints one JSON object: ``{"ok": true, ...}`` with the
bytes it would need, or ``{"ok": false, "error": "..."}``. A file that makes llama.cpp abort or hang ends only this
process. `vet` runs it and turns whatever comes of it into a `Footprint` or a `LoadFailed`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

from engines.api import Footprint, ModelSpec
from engines.errors import EngineError, LoadFailed

TIME_LIMIT_S = 60.0
"""For a file of no size; `SLOWEST_READ` is added for what has to be read."""

SLOWEST_READ = 100e6
"""Bytes a second that any disk worth serving from delivers."""

DECODE_UP_TO = 4 * 2**30
"""Weights up to so many bytes are read and used for one token; of larger ones only the structure is looked at."""

_PROBE_CELLS = 256  # llama.cpp rounds a context up to this
_PROBE_BATCH = 32


def vet(spec: ModelSpec, *, time_limit_s: float | None = None) -> Footprint:
    """What a model file needs in memory, after a throwaway process has opened it and decoded a token.

    Raises:
        LoadFailed: The file is not one that can be served; the message is one sentence without paths.
    """
    size = file_bytes(spec.path)
    limit_s = TIME_LIMIT_S + size / SLOWEST_READ if time_limit_s is None else time_limit_s
    command = [sys.executable, "-m", "engines.llamacpp.vet", str(spec.path)]
    for field in ("slots", "ctx", "batch", "flash_attn", "cache_type_k", "cache_type_v"):
        command += [f"--{field.replace('_', '-')}", str(getattr(spec, field))]
    name = spec.path.name
    try:
        done = subprocess.run(
            command, env=_environment(), stdin=subprocess.DEVNULL, capture_output=True, timeout=limit_s, check=False
        )
    except subprocess.TimeoutExpired:
        raise LoadFailed(f"{name} could not be opened within {limit_s:.0f} s") from None
    except OSError as error:
        raise LoadFailed(f"{name} could not be vetted: no process for it ({error.strerror})") from None
    if done.returncode < 0:
        raise LoadFailed(f"{name} is damaged: opening it ends llama.cpp with {_signal_name(-done.returncode)}")
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        raise LoadFailed(
            f"{name} could not be vetted: the process left with {done.returncode}, saying nothing"
        ) from None
    if not answer["ok"]:
        raise LoadFailed(answer["error"])
    return Footprint(weights=size, cache=answer["cache"], buffers=answer["buffers"])


def file_bytes(path: Path) -> int:
    """Size of a model file; of a split one, of all parts. Raises `LoadFailed` if it is not there."""
    stem, mark, count = path.stem.partition("-00001-of-")
    files = [path.with_name(f"{stem}-{i:05}-of-{count}.gguf") for i in range(1, int(count) + 1)] if mark else [path]
    try:
        return sum(file.stat().st_size for file in files)
    except OSError as error:
        raise LoadFailed(f"{path.name} cannot be read ({error.strerror})") from None


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _environment() -> dict[str, str]:
    """What the process needs to start Python, and nothing of what the server knows."""
    kept = {key: os.environ[key] for key in ("PATH", "LD_LIBRARY_PATH", "LANG", "TMPDIR") if key in os.environ}
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "CUDA_VISIBLE_DEVICES": "",
        "GGML_NO_BACKTRACE": "1",
    }


def main() -> int:
    """The process: limits itself, opens the file, prints what it found."""
    parser = argparse.ArgumentParser(prog="python -m engines.llamacpp.vet", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--slots", type=int, default=1)
    parser.add_argument("--ctx", type=int, default=_PROBE_CELLS)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--flash-attn", default="auto")
    parser.add_argument("--cache-type-k", default="f16")
    parser.add_argument("--cache-type-v", default="f16")
    options = vars(parser.parse_args())
    spec = ModelSpec(options.pop("file"), **options)
    try:
        _limit(file_bytes(spec.path))
        answer: dict[str, object] = {"ok": True, **_examine(spec)}
    except (EngineError, MemoryError) as error:
        answer = {"ok": False, "error": str(error) or f"{spec.path.name} asks for more memory than vetting allows"}
    print(json.dumps(answer))
    return 0


def _limit(size: int) -> None:
    """No core file, and memory and CPU time in proportion to the file: absurd counts in it then fail early."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (3 * size + 16 * 2**30,) * 2)
    cpu_s = int(2 * TIME_LIMIT_S + size / SLOWEST_READ)
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))


def _examine(spec: ModelSpec) -> dict[str, int]:
    """Open the model with one small slot and decode a token; then add up what the whole shape would allocate."""
    from engines.llamacpp.native import NativeContext, NativeModel  # loads llama.cpp: only in this process

    cells = min(spec.ctx, _PROBE_CELLS)
    model = NativeModel(spec.path, repack=False)
    if not model.generates:
        raise LoadFailed(f"{spec.path.name} does not generate text (an embedding or encoder model)")
    context = NativeContext(model, dataclasses.replace(spec, slots=1, ctx=cells, batch=_PROBE_BATCH), threads=1)
    if file_bytes(spec.path) <= DECODE_UP_TO:
        context.try_token(max(model.bos, 0))
    of_slot = context.buffers.of("RS") + context.buffers.of("KV") * spec.ctx // cells
    context.close()
    model.close()
    model = NativeModel(spec.path, no_alloc=True)
    context = NativeContext(model, spec, threads=1)
    buffers = context.buffers.of("compute", "output")
    context.close()
    model.close()
    return {"cache": of_slot * spec.slots, "buffers": buffers}


if __name__ == "__main__":
    sys.exit(main())
