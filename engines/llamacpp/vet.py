"""Opens a model file in a process that may die, so that the one that serves does not.

``python -m engines.llamacpp.vet FILE [--slots N] [--ctx N] ...`` prints one JSON object: ``{"ok": true, ...}`` with the
bytes it would need and a note where conversations cannot work, or ``{"ok": false, "error": "..."}``. A file that makes
llama.cpp abort or hang ends only this process. `vet` runs it and turns whatever comes of it into a `Footprint` or a
`LoadFailed`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import resource
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.api import Footprint, ModelSpec, WaitCallback
from engines.errors import EngineError, InvalidPrompt, LoadFailed
from engines.gguf_files import parts

if TYPE_CHECKING:
    from engines.llamacpp.native.model import NativeModel

TIME_LIMIT_S = 60.0
"""For a file of no size; `SLOWEST_READ` is added for what has to be read."""

SLOWEST_READ = 100e6
"""Bytes a second that any disk worth serving from delivers."""

DECODE_UP_TO = 4 * 2**30
"""Weights up to so many bytes are read and used for one token; of larger ones only the structure is looked at."""

GIVE_WAY = 5
"""Nice value of the process beside the server's: where cores are few, running sequences come first."""

WAIT_S = 0.1
"""How often whoever waits for the process is asked whether to go on."""

_OWN_GROUP: dict[str, Any] = {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}
"""A Ctrl-C for the server says nothing about the file. A session of its own would say that too, but there Linux may
give it the same time as the whole server, whatever its nice value."""

_PROBE_CELLS = 256  # llama.cpp rounds a context up to this
_PROBE_BATCH = 32
_MOST_CELLS = 1 << 22
"""Of all slots together, that are asked for to learn what they would take; beyond, they are computed."""
_PROBE_SLOTS = 3
_SHAPE = ("slots", "ctx", "batch", "flash_attn", "cache_type_k", "cache_type_v", "swa_full")


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
    command = [sys.executable, "-m", "engines.llamacpp.vet", os.path.abspath(spec.path)]
    for field in _SHAPE:
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


def file_bytes(path: Path) -> int:
    """Size of a model file; of a split one, of all parts. Raises `LoadFailed` if one is not there, or is no file."""
    try:
        found = [part.stat() for part in parts(path)]
    except OSError as error:
        raise LoadFailed(f"{path.name} cannot be read ({error.strerror})") from None
    if not all(stat.S_ISREG(one.st_mode) for one in found):
        raise LoadFailed(f"{path.name} is not a regular file")
    return sum(one.st_size for one in found)


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


def main() -> int:
    """The process: limits itself, opens the file, prints what it found."""
    parser = argparse.ArgumentParser(prog="python -m engines.llamacpp.vet", description=__doc__)
    parser.add_argument("file", type=Path)
    defaults = ModelSpec(Path())
    for field in _SHAPE:
        default = getattr(defaults, field)
        kind = {"True": True, "False": False}.__getitem__ if isinstance(default, bool) else type(default)
        parser.add_argument(f"--{field.replace('_', '-')}", type=kind, default=default)
    options = vars(parser.parse_args())
    spec = ModelSpec(options.pop("file"), **options)
    try:
        size = file_bytes(spec.path)
        _limit(size)
        answer: dict[str, object] = {"ok": True, **_examine(spec, decode=size <= DECODE_UP_TO)}
    except EngineError as error:
        answer = {"ok": False, "error": str(error)}
    except MemoryError:
        answer = {"ok": False, "error": f"{spec.path.name} needs more memory than vetting allows"}
    print(json.dumps(answer))
    return 0


def _limit(size: int) -> None:
    """No core file, and memory and CPU time in proportion to the file: absurd counts in it then fail early."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # rather this process than the one that serves
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _allow_at_most(resource.RLIMIT_AS, 3 * size + 16 * 2**30)
    _allow_at_most(resource.RLIMIT_CPU, int(2 * TIME_LIMIT_S + size / SLOWEST_READ))


def _allow_at_most(what: int, amount: int) -> None:
    """Set a limit, the hard one a little above, so that a signal may tell which it was; a lower one in force stays."""
    _, most = resource.getrlimit(what)
    if most != resource.RLIM_INFINITY:
        amount = min(amount, most - 1)
    resource.setrlimit(what, (amount, amount + 1))


def _examine(spec: ModelSpec, *, decode: bool) -> dict[str, object]:
    """Add up what the whole shape would allocate, and use the model: with one small slot, or only its tokenizer."""
    from engines.llamacpp.native.context import NativeContext  # loads llama.cpp: only in this process
    from engines.llamacpp.native.model import NativeModel

    model = NativeModel(spec.path, no_alloc=True)
    if not model.generates:
        raise LoadFailed(f"{spec.path.name} does not generate text (an embedding or encoder model)")
    found: dict[str, object] = dict(zip(("cache", "buffers", "on_gpu"), _sizes(model, spec), strict=True))
    _try_tokenizer(model)
    found["note"] = _try_template(model)
    model.close()
    if decode:
        model = NativeModel(spec.path, repack=False)
        cells = min(spec.ctx, _PROBE_CELLS)
        slots = min(spec.slots, _PROBE_SLOTS)
        context = NativeContext(model, dataclasses.replace(spec, slots=slots, ctx=cells, batch=_PROBE_BATCH), threads=1)
        context.try_step(max(model.bos, 0))
        context.try_tasks(max(model.bos, 0), slots)
        context.close()
        model.close()
    return found


def _sizes(model: NativeModel, spec: ModelSpec) -> tuple[int, ...]:
    """Bytes of the caches and of the buffers of the whole shape, and what comes to them on a GPU.

    llama.cpp keeps a table of all cells even where it allocates no cache: where they would take terabytes, that alone
    takes gigabytes and a minute. Beyond `_MOST_CELLS` all grow in proportion to the context, so two smaller ones tell.
    """
    most = max(_MOST_CELLS // spec.slots, 2 * _PROBE_CELLS)
    if spec.ctx <= most:
        return _sizes_at(model, spec)
    half, whole = (_sizes_at(model, dataclasses.replace(spec, ctx=ctx)) for ctx in (most // 2, most))
    steps = (spec.ctx - most) / (most - most // 2)
    return tuple(int(end + (end - middle) * steps) for middle, end in zip(half, whole, strict=True))


def _sizes_at(model: NativeModel, spec: ModelSpec) -> tuple[int, int, int]:
    from engines.llamacpp.cuda_buffers import caches, half_copies, has_flash_attention
    from engines.llamacpp.native.context import NativeContext

    with _cache_lines() as lines:
        context = NativeContext(model, spec, threads=1)
    held, buffers = caches(lines), context.buffers.of("compute", "output")
    cache = sum(int(one.n_bytes) for one in held) + context.buffers.of("RS")
    context.close()
    on_gpu = max(map(half_copies, held), default=0)
    if held and spec.flash_attn == "auto" and not has_flash_attention(*model.heads):
        with contextlib.suppress(LoadFailed):  # a quantised V cache: flash attention it is, on the host then
            context = NativeContext(model, dataclasses.replace(spec, flash_attn="off"), threads=1)
            on_gpu = max(0, context.buffers.of("compute", "output") - buffers)
            context.close()
    return cache, buffers, int(on_gpu)


@contextlib.contextmanager
def _cache_lines() -> Iterator[list[str]]:
    """What llama.cpp logs: without allocation it tells the size of a KV cache there alone."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]  # all that it does
    logger = logging.getLogger("engines.llamacpp")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


def _try_tokenizer(model: NativeModel) -> None:
    """Tokenise text of every kind: a flaw in the vocabulary must end this process, not a prompt in the other.

    Where a piece of text has no token of its own, some tokenizers look for one for each of its bytes, and llama.cpp
    throws if that is not there. So every byte that UTF-8 has must come up in a character without a token.
    """
    from engines.llamacpp.tokenizer import OWN_STACK_CHARS, Tokenizer

    rare = [*range(0x800, 0xD800, 61), *range(0xE000, 0x10000, 61), *range(0x10000, 0x110000, 4099)]
    for code in [*range(0x800), *rare]:
        model.tokenize(chr(code))
    Tokenizer(model).tokenize("A" * 2 * OWN_STACK_CHARS)


def _try_template(model: NativeModel) -> str:
    """Why no conversation can work; empty if one does."""
    from engines.llamacpp.model_template import open_template, reason  # needs llama.cpp too

    try:
        open_template(model)
    except InvalidPrompt as error:
        return reason(error)
    return ""


if __name__ == "__main__":
    sys.exit(main())
