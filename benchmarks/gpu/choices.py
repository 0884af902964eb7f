"""Three choices that were made on a CPU and may be wrong on a GPU, each measured both ways.

    python -m benchmarks.gpu.choices MODEL [--device gpu:0] [--slots 8 32] [--steps 50] [--json FILE]

- *Tokens chosen on the host*: the logits of all slots travel there each step. The other way: llama.cpp's samplers
  belong to the context (``llama_set_sampler``) and run where the model does.
- *A cache of its own for each slot*: a gap between the slots at work means a pass more. The other way: one cache for
  all (``kv_unified``), of which attention reads what all slots hold.
- *A prompt's chunk in a pass of its own*: two passes a step. The other ways: its first row in the streams' pass, and,
  with one cache for all, everything in one pass.

The engine's context alone, without a server. Medians, in milliseconds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import llama_cpp
import numpy as np

from benchmarks.gpu.worker_share import spec_of
from benchmarks.steps import decode_ms, sampled_step_ms, step_ms, table
from engines.api import ModelSpec
from engines.llamacpp.native.context import NativeContext
from engines.llamacpp.native.gpus import index_of
from engines.llamacpp.native.model import NativeModel
from orchd.machine.cores import usable_cores

CTX: Final = 1024
CHUNK: Final = 64
"""Rows of a prompt in a step with streams."""
DEPTH: Final = 256
"""Tokens that each slot holds when the passes are compared."""


@contextlib.contextmanager
def unified(on: bool) -> Iterator[None]:
    """Contexts that are made meanwhile have one cache for all slots, if ``on``."""
    make = llama_cpp.llama_init_from_model

    def made(model: Any, params: Any) -> Any:
        params.kv_unified = on
        return make(model, params)

    llama_cpp.llama_init_from_model = made
    try:
        yield
    finally:
        llama_cpp.llama_init_from_model = make


def by_sampler(context: NativeContext, slots: int, steps: int) -> dict[str, float]:
    """A step of all slots and its tokens."""
    try:
        host, graph = sampled_step_ms(context, slots, tokens=10 + steps)
    except SystemExit:
        return {"on the host": sampled_on_host_ms(context, slots, steps)}
    return {"on the host": host, "llama_set_sampler": graph}


def sampled_on_host_ms(context: NativeContext, slots: int, steps: int) -> float:
    """The same where the backend does not take samplers into its graph: greedy, from the logits."""
    context.clear()
    took = []
    for position in range(10 + steps):
        began = time.perf_counter()
        step_ms(context, range(slots), [position], all_outputs=True)
        context.logits(slots).argmax(axis=1)
        took.append((time.perf_counter() - began) * 1e3)
    return statistics.median(took[10:])


def by_gaps(context: NativeContext, slots: int, steps: int) -> dict[str, float]:
    """Half of the slots at work: neighbours, and every other one."""
    half = max(slots // 2, 1)
    return {
        "neighbours": decode_ms(context, range(half), steps),
        "every other slot": decode_ms(context, range(0, 2 * half, 2), steps),
    }


def mixed_step_ms(context: NativeContext, slots: int, steps: int, *, prompt_first: bool) -> float:
    """One row for each stream, and a chunk of a prompt in the slot after theirs.

    Args:
        context: With one slot more than there are streams at least.
        slots: All of them.
        steps: How many are measured.
        prompt_first: The chunk's rows before the streams', as orchd plans them; or in the order of the slots.
    """
    fill(context, slots - 1, DEPTH)
    chunk = min(CHUNK, context.n_rows - slots + 1)
    took = []
    for step in range(min(steps, (CTX - DEPTH) // chunk - 1)):
        streams = [(slot, DEPTH + step, 1) for slot in range(slots - 1)]
        prompt = [(slots - 1, step * chunk + row, int(row == chunk - 1)) for row in range(chunk)]
        rows = np.array([*prompt, *streams] if prompt_first else [*streams, *prompt], np.int32)
        context.token[: len(rows)] = np.random.default_rng(step).integers(1000, 2000, len(rows))
        context.seq[: len(rows)], context.pos[: len(rows)], context.output[: len(rows)] = rows.T
        began = time.perf_counter()
        context.decode(len(rows))
        took.append((time.perf_counter() - began) * 1e3)
    return statistics.median(took)


def fill(context: NativeContext, slots: int, depth: int) -> None:
    """So many tokens into each of the first slots."""
    context.clear()
    size = min(depth, context.n_rows)
    for slot in range(slots):
        for start in range(0, depth, size):
            step_ms(context, [slot], range(start, min(start + size, depth)))


def measure(model: NativeModel, spec: ModelSpec, threads: int, steps: int) -> dict[str, dict[str, float]]:
    """All three with so many slots: by what was tried, by how."""
    found: dict[str, dict[str, float]] = {}
    for on in (False, True):
        with unified(on):
            context = NativeContext(model, spec, threads=threads)
        try:
            where = "kv_unified" if on else "a cache each"
            decode_ms(context, range(spec.slots), 10)  # warm-up
            if not on:
                found["sampler"] = by_sampler(context, spec.slots, steps)
            for name, ms in by_gaps(context, spec.slots, steps).items():
                found.setdefault(f"streams in half of the slots, {name}", {})[where] = ms
            passes = found.setdefault(f"{spec.slots - 1} streams and {CHUNK} rows of a prompt", {})
            if on:
                passes["kv_unified, one pass"] = mixed_step_ms(context, spec.slots, steps, prompt_first=False)
            else:
                passes["prompt in its own pass"] = mixed_step_ms(context, spec.slots, steps, prompt_first=True)
                passes["in the order of the slots"] = mixed_step_ms(context, spec.slots, steps, prompt_first=False)
        finally:
            context.close()
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table for each number of slots."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.choices", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="gpu:0")
    parser.add_argument("--slots", type=int, nargs="+", default=(8, 32))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # as nvidia-smi counts
    model = NativeModel(options.model, gpu=index_of(spec_of(options.device)))
    found: dict[str, Any] = {}
    try:
        for slots in options.slots:
            spec = ModelSpec(options.model, slots=slots, ctx=CTX)
            found[str(slots)] = measure(model, spec, usable_cores(), options.steps)
            rows = [[what, how, f"{ms:.2f}"] for what, ways in found[str(slots)].items() for how, ms in ways.items()]
            table(f"{options.model.stem} on {options.device}, {slots} slots:", ("what", "how", "ms a step"), rows)
            if options.json is not None:
                options.json.write_text(json.dumps(found, indent=1) + "\n")
    finally:
        model.close()


if __name__ == "__main__":
    main()
