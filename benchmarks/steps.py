"""What a step costs, without a server: the figures behind the choice of slots, of chunk sizes and of defaults.

    python -m benchmarks.steps [--model FILE] [--threads T]

Five tables, in milliseconds: decoding by which slots work; a copy between two slots, by how many tokens a slot has room
for and holds; a step whose tokens are sampled by llama.cpp after it or as part of its graph; decoding by flash
attention and type of the KV cache; and a prompt token by the size of the chunk it comes in. Medians; the settings take
turns.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import llama_cpp
import numpy as np

from engines.api import ModelSpec, SamplingParams
from engines.llamacpp.native.context import NativeContext
from engines.llamacpp.native.model import NativeModel
from engines.llamacpp.sampling import REPEAT_WINDOW
from orchd.machine.cores import usable_cores
from orchd.models.references import demo_model_path

SLOTS: Final = 8
CTX: Final = 2048
WORKING: Final = ([0], [0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 3, 4], [0, 2, 4, 6], [3, 2, 1, 0], list(range(8)))
COPIED: Final = (512, 2048, 8192, 32768)
HELD: Final = (100, 500, 2000, 8000)
CHUNKS: Final = (16, 32, 48, 63, 64, 96, 128, 192, 256, 512)
DEPTHS: Final = (0, 512, 1024)


@contextlib.contextmanager
def opened(spec: ModelSpec, threads: int) -> Iterator[NativeContext]:
    """A context with its model."""
    model = NativeModel(spec.path)
    try:
        context = NativeContext(model, spec, threads=threads)
        try:
            yield context
        finally:
            context.close()
    finally:
        model.close()


def step_ms(
    context: NativeContext, slots: Sequence[int], positions: Sequence[int], *, all_outputs: bool = False
) -> float:
    """One step with a row for each position in each slot; logits of the last row, or of all."""
    rows = len(slots) * len(positions)
    context.token[:rows] = np.random.default_rng(rows).integers(1000, 2000, rows)
    context.pos[:rows] = np.tile(positions, len(slots))
    context.seq[:rows] = np.repeat(slots, len(positions))
    context.output[:rows] = all_outputs
    context.output[rows - 1] = 1
    began = time.perf_counter()
    context.decode(rows)
    return (time.perf_counter() - began) * 1e3


def decode_ms(context: NativeContext, slots: Sequence[int], tokens: int) -> float:
    """Median step of streams that begin together and run for so many tokens."""
    context.clear()
    return statistics.median(step_ms(context, slots, [position]) for position in range(tokens))


def copy_ms(context: NativeContext, held: int) -> tuple[float, float, float]:
    """Median step of one stream, what it takes longer if it copies a whole slot, and a copy of what a slot holds."""
    context.clear()
    for start in range(0, held, 500):
        step_ms(context, [0], range(start, min(start + 500, held)))
    alone, whole, by_itself = [], [], []
    for position in range(0, 18, 2):
        alone.append(step_ms(context, [1], [position]))
        context.copy_slot(0, 2, context.n_rows * CTX)  # more than there is room for: not by itself
        whole.append(step_ms(context, [1], [position + 1]))
        began = time.perf_counter()
        if context.copy_slot(0, 3, 1):
            by_itself.append((time.perf_counter() - began) * 1e3)
    step = statistics.median(alone)
    return step, statistics.median(whole) - step, statistics.median(by_itself or [float("nan")])


@contextlib.contextmanager
def chain(params: SamplingParams, *, n_vocab: int, prompt: Sequence[int] = ()) -> Iterator[Any]:
    """llama.cpp's chain of samplers for these settings, as its own programs build it."""
    links = []
    if params.repeat_penalty != 1:
        links.append(llama_cpp.llama_sampler_init_penalties(n_vocab, REPEAT_WINDOW, params.repeat_penalty, 0.0, 0.0))
        for token in prompt[-REPEAT_WINDOW:]:
            llama_cpp.llama_sampler_accept(links[0], token)
    if params.temperature == 0:
        links.append(llama_cpp.llama_sampler_init_greedy())
    else:
        links += [
            *([llama_cpp.llama_sampler_init_top_k(params.top_k)] if params.top_k else []),
            llama_cpp.llama_sampler_init_top_p(params.top_p, 1),
            llama_cpp.llama_sampler_init_min_p(params.min_p, 1),
            llama_cpp.llama_sampler_init_temp(params.temperature),
            llama_cpp.llama_sampler_init_dist(params.seed),
        ]
    handle = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    for link in links:
        llama_cpp.llama_sampler_chain_add(handle, link)
    try:
        yield handle
    finally:
        llama_cpp.llama_sampler_free(handle)


def sampled_step_ms(context: NativeContext, slots: int, *, tokens: int = 60) -> tuple[float, float]:
    """A step and a token for each slot: sampled after it, and by samplers that belong to the context."""
    n_vocab = context.logits(1).shape[1]
    took: tuple[list[float], list[float]] = [], []
    with contextlib.ExitStack() as stack:
        for turn in range(6):
            in_graph = turn % 2
            # New ones each time: a chain that was in a graph leaves tokens unsampled outside of it, and that aborts.
            settings = [SamplingParams(seed=seed) for seed in range(slots)]
            chains = [stack.enter_context(chain(params, n_vocab=n_vocab)) for params in settings]
            for slot, handle in enumerate(chains):
                if in_graph and not llama_cpp.llama_set_sampler(context.handle, slot, handle):
                    raise SystemExit("llama.cpp does not take these samplers into its graph")
            context.clear()
            for position in range(tokens):
                began = time.perf_counter()
                step_ms(context, range(slots), [position], all_outputs=True)
                for row, handle in enumerate(chains):
                    if in_graph:
                        llama_cpp.llama_get_sampled_token_ith(context.handle, row)
                    else:
                        llama_cpp.llama_sampler_sample(handle, context.handle, row)
                if position >= 10:  # the first ones make room
                    took[in_graph].append((time.perf_counter() - began) * 1e3)
            for slot in range(slots):
                llama_cpp.llama_set_sampler(context.handle, slot, None)
    return statistics.median(took[0]), statistics.median(took[1])


def token_ms(context: NativeContext, chunk: int, depth: int) -> float:
    """Milliseconds for each token of a prompt's chunks between a depth and 256 tokens more, but two chunks at least."""
    context.clear()
    done, steps = 0, []
    while done < depth + max(256, 2 * chunk):
        size = min(512, depth - done) if done < depth else chunk
        took = step_ms(context, [0], range(done, done + size))
        if done >= depth:
            steps.append(took / size)
        done += size
    return statistics.median(steps)


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print it as Markdown."""
    print(f"\n{title}\n", "| " + " | ".join(head) + " |", "| --- " * len(head) + "|", sep="\n")
    for row in rows:
        print("| " + " | ".join(row) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description=__doc__)
    parser.add_argument(
        "--model", type=Path, default=demo_model_path(), metavar="FILE", help="(default: the demo model)"
    )
    parser.add_argument("--threads", type=int, default=usable_cores())
    options = parser.parse_args()
    if options.model is None:
        parser.error("the demo model is not installed; run 'make setup', or give --model FILE")
    spec = ModelSpec(options.model.resolve(), slots=SLOTS, ctx=CTX)

    with opened(spec, options.threads) as context:
        decode_ms(context, [0], 50)  # warm-up
        turns = [[decode_ms(context, slots, 60) for slots in WORKING] for _ in range(3)]
    by_slots = [f"{statistics.median(column):.1f}" for column in zip(*turns, strict=True)]
    named = [str(slots).replace(" ", "") for slots in WORKING]
    table("One row in each of these slots, in this order:", ("slots", "ms"), list(zip(named, by_slots, strict=True)))

    rows = []
    for ctx in COPIED:
        with opened(replace(spec, slots=4, ctx=ctx), options.threads) as context:
            for held in (held for held in HELD if held <= ctx):
                rows.append([f"{ctx:,}", f"{held:,}", *(f"{ms:.1f}" for ms in copy_ms(context, held))])
    head = ("tokens a slot", "held", "step", "more with a copy of the slot", "copy of what is held")
    table("One row, and a copy of another slot's cache:", head, rows)

    with opened(spec, options.threads) as context:
        steps = [[str(slots), *(f"{ms:.2f}" for ms in sampled_step_ms(context, slots))] for slots in (1, 4, 8)]
    table("A step and its tokens, sampled:", ("slots", "after it", "in llama.cpp's graph"), steps)

    kinds = {
        "flash attention": spec,
        "without": replace(spec, flash_attn="off"),
        "with, KV cache q8_0": replace(spec, cache_type_k="q8_0", cache_type_v="q8_0"),
    }
    with contextlib.ExitStack() as stack:
        contexts = [stack.enter_context(opened(kind, options.threads)) for kind in kinds.values()]
        rows = []
        for count in (1, 4, 8):
            turns = [[decode_ms(context, range(count), 400) for context in contexts] for _ in range(3)]
            rows.append([str(count), *(f"{statistics.median(column):.1f}" for column in zip(*turns, strict=True))])
        table("Streams of 400 tokens:", ("streams", *kinds), rows)
        rows = []
        for chunk in CHUNKS:
            cells = [
                " / ".join(f"{token_ms(context, chunk, depth):.2f}" for depth in DEPTHS) for context in contexts[:2]
            ]
            rows.append([str(chunk), *cells])
        table(f"A prompt token at position {' / '.join(map(str, DEPTHS))}:", ("chunk", *list(kinds)[:2]), rows)


if __name__ == "__main__":
    main()
