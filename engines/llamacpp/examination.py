"""What the process does that opens a model file because it may die of it: limits itself, looks, prints what it found.

``python -m engines.llamacpp.examination FILE [--slots N] [--ctx N] ...`` prints one JSON object: ``{"ok": true, ...}``
with the bytes it would need and a note where conversations cannot work, or ``{"ok": false, "error": "..."}``. A file
that makes llama.cpp abort or hang ends only this process. `engines.llamacpp.vet` runs it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import resource
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from engines.api import ModelSpec
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

_PROBE_CELLS = 256  # llama.cpp rounds a context up to this
_PROBE_BATCH = 32
_MOST_CELLS = 1 << 22
"""Of all slots together, that are asked for to learn what they would take; beyond, they are computed."""
_PROBE_SLOTS = 3
SHAPE = ("slots", "ctx", "batch", "flash_attn", "cache_type_k", "cache_type_v", "swa_full")


def main() -> int:
    """The process: limits itself, opens the file, prints what it found."""
    parser = argparse.ArgumentParser(prog="python -m engines.llamacpp.examination", description=__doc__)
    parser.add_argument("file", type=Path)
    defaults = ModelSpec(Path())
    for field in SHAPE:
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


def file_bytes(path: Path) -> int:
    """Size of a model file; of a split one, of all parts. Raises `LoadFailed` if one is not there, or is no file."""
    try:
        found = [part.stat() for part in parts(path)]
    except OSError as error:
        raise LoadFailed(f"{path.name} cannot be read ({error.strerror})") from None
    if not all(stat.S_ISREG(one.st_mode) for one in found):
        raise LoadFailed(f"{path.name} is not a regular file")
    return sum(one.st_size for one in found)


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
    from engines.llamacpp.native import trials
    from engines.llamacpp.native.context import NativeContext  # loads llama.cpp: only in this process
    from engines.llamacpp.native.model import NativeModel

    model = NativeModel(spec.path, no_alloc=True)
    if not model.generates:
        raise LoadFailed(f"{spec.path.name} does not generate text (an embedding or encoder model)")
    if model.most_slots is not None and spec.slots > model.most_slots:  # a large file is not tried
        raise LoadFailed(
            f"{spec.path.name} can only be served with up to {model.most_slots} slots: llama.cpp ends where more of "
            "its tasks come and go"
        )
    found: dict[str, object] = dict(zip(("cache", "buffers", "on_gpu"), _sizes(model, spec), strict=True))
    _try_tokenizer(model)
    found["note"] = _try_template(model)
    model.close()
    if decode:
        model = NativeModel(spec.path, repack=False)
        cells = min(spec.ctx, _PROBE_CELLS)
        slots = min(spec.slots, _PROBE_SLOTS)
        context = NativeContext(model, dataclasses.replace(spec, slots=slots, ctx=cells, batch=_PROBE_BATCH), threads=1)
        trials.try_step(context, max(model.bos, 0))
        trials.try_tasks(context, max(model.bos, 0), slots)
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
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield lines
    finally:
        logger.setLevel(level)
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
