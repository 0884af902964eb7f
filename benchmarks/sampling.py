"""What choosing tokens costs, outside of llama.cpp's own computing: by settings, and beside a busy thread of Python.

    python -m benchmarks.sampling [--vocab N | --logits-of FILE] [--slots 8 32] [--model FILE] [--threads T]

Two tables, in milliseconds a step, medians. The first one chooses a token for each slot from random logits like a
model's, some hundred tokens of which stand out, or from those of a model that reads this text: with llama.cpp's chain
of samplers over the whole vocabulary, and as orchd does.

The second one steps a model with 16 sampled streams, alone, while another process computes in Python, and while another
thread does, by how soon Python hands its lock from one to the other (`sys.setswitchinterval`); and how late an event
loop is beside such a thread. A process takes a core as a thread does, but not the lock: what a step takes longer beside
the thread is what the lock costs. With ``--threads 1`` there is a core for both.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import llama_cpp
import numpy as np
import numpy.typing as npt

from benchmarks.steps import chain, table
from engines.api import DeviceSpec, ModelSpec, SamplingParams, Sequence
from engines.llamacpp.chooser import Chooser
from engines.llamacpp.engine import LlamaCppEngine
from engines.llamacpp.native.context import NativeContext
from engines.llamacpp.native.model import NativeModel
from engines.llamacpp.sampling import Sampler
from orchd.machine.cores import usable_cores
from orchd.models.references import demo_model_path

Floats = npt.NDArray[np.float32]

SETTINGS: Final = {
    "defaults": SamplingParams(),
    "repeat_penalty 1.1": SamplingParams(repeat_penalty=1.1),
    "top_k 0": SamplingParams(top_k=0),
    "top_k 0, min_p 0": SamplingParams(top_k=0, min_p=0),
    "top_k 0, min_p 0, top_p 0.99": SamplingParams(top_k=0, min_p=0, top_p=0.99),
    "top_k 0, top_p 1": SamplingParams(top_k=0, top_p=1),
    "top_k 0, top_p 1, min_p 0": SamplingParams(top_k=0, top_p=1, min_p=0),
    "greedy, repeat_penalty 1.1": SamplingParams(temperature=0, repeat_penalty=1.1),
}
PROMPT: Final = range(100, 164)
STREAMS: Final = 16
INTERVALS_MS: Final = (5.0, 1.0, 0.5, 0.2)
"""The first one is Python's own; `orchd.process.SWITCH_INTERVAL_S` is what `orchd serve` sets."""

PAUSE_S: Final = 0.002
BUSY: Final = "while True: sum(range(1000))"


def rows(slots: int, n_vocab: int) -> Floats:
    """Logits like a model's, shape (slots, n_vocab)."""
    chance = np.random.default_rng(slots)
    bulk = chance.normal(-5, 2.5, (slots, n_vocab))
    outstanding = chance.exponential(6, (slots, n_vocab)) * (chance.random((slots, n_vocab)) < 80 / n_vocab)
    logits: Floats = (bulk + outstanding).astype(np.float32)
    return logits


def rows_of(path: Path, slots: int) -> Floats:
    """What a model computes at so many places of a text, shape (slots, n_vocab)."""
    vocab = LlamaCppEngine().load_vocab(path)
    tokens = vocab.tokenize(str(__doc__))[: 8 * slots]
    vocab.close()
    model = NativeModel(path)
    context = NativeContext(model, ModelSpec(path, slots=1, ctx=512), threads=usable_cores())
    seen = []
    for position, token in enumerate(tokens):
        context.token[0], context.pos[0], context.seq[0], context.output[0] = token, position, 0, True
        context.decode(1)
        seen.append(context.logits(1)[0].copy())
    context.close()
    model.close()
    return np.stack([seen[number * len(seen) // slots] for number in range(slots)])


def logits_for(options: argparse.Namespace, slots: int) -> Floats:
    """As they were asked for."""
    return rows_of(options.logits_of, slots) if options.logits_of else rows(slots, options.vocab)


def median_ms(choose: Callable[[Floats], object], logits: Floats, times: int) -> float:
    """Of so many calls, each with logits that were just written."""
    took = []
    for _ in range(times):
        fresh = logits.copy()
        began = time.perf_counter()
        choose(fresh)
        took.append((time.perf_counter() - began) * 1e3)
    return statistics.median(took)


def whole_ms(params: SamplingParams, logits: Floats) -> float:
    """With a chain over all candidates, as `llama_sampler_sample` does it."""
    n_vocab = logits.shape[1]
    candidates = np.zeros(n_vocab, np.dtype(llama_cpp.llama_token_data))
    data = candidates.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token_data))
    with contextlib.ExitStack() as stack:
        chains = [stack.enter_context(chain(params, n_vocab=n_vocab, prompt=PROMPT)) for _ in logits]

        def choose(fresh: Floats) -> None:
            for handle, row in zip(chains, fresh, strict=True):
                candidates["id"], candidates["logit"] = np.arange(n_vocab), row
                array = llama_cpp.llama_token_data_array(data=data, size=n_vocab, selected=-1, sorted=False)
                llama_cpp.llama_sampler_apply(handle, ctypes.byref(array))
                llama_cpp.llama_sampler_accept(handle, int(candidates["id"][array.selected]))

        return median_ms(choose, logits, 7)


def chosen_ms(params: SamplingParams, logits: Floats) -> float:
    """As orchd does it."""
    chooser = Chooser([])
    with contextlib.ExitStack() as stack:
        samplers = [stack.enter_context(contextlib.closing(Sampler(params, prompt=PROMPT))) for _ in logits]
        return median_ms(lambda fresh: chooser.choose(fresh, samplers), logits, 40)


@contextlib.contextmanager
def busy_thread() -> Iterator[None]:
    """Another thread that computes in Python all the time."""
    done = threading.Event()

    def compute() -> None:
        while not done.is_set():
            sum(range(1000))

    thread = threading.Thread(target=compute)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextlib.contextmanager
def busy_process() -> Iterator[None]:
    """Another process that does the same."""
    process = subprocess.Popen([sys.executable, "-c", BUSY])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def step_ms(model: Any, prompts: list[list[int]], tokens: int) -> float:
    """A step of sampled streams."""
    for number, prompt in enumerate(prompts):
        sampling = SamplingParams(seed=number, ignore_eos=True)
        model.admit(Sequence(str(number), prompt, tokens, sampling=sampling))
    took = []
    while model.busy:
        began = time.perf_counter()
        streams = len(model.step())
        if streams == len(prompts):
            took.append((time.perf_counter() - began) * 1e3)
    return statistics.median(took)


def late_ms(times: int = 40) -> float:
    """How late an event loop's timers are."""
    late = []

    async def wait() -> None:
        for _ in range(times):
            began = time.perf_counter()
            await asyncio.sleep(PAUSE_S)
            late.append((time.perf_counter() - began - PAUSE_S) * 1e3)

    asyncio.run(wait())
    return statistics.median(late)


def beside_ms(path: Path, threads: int) -> list[list[str]]:
    """Rows of the second table; the settings take turns."""
    engine = LlamaCppEngine()
    vocab = engine.load_vocab(path)
    prompts = [vocab.tokenize(f"Here are some facts about the number {n}:") for n in range(STREAMS)]
    model = engine.load(ModelSpec(path, slots=STREAMS, ctx=256), DeviceSpec("cpu", threads=threads))
    usual_s = sys.getswitchinterval()
    took: dict[float, list[tuple[float, ...]]] = {interval: [] for interval in INTERVALS_MS}
    try:
        step_ms(model, prompts, 16)
        for _ in range(3):
            for interval in INTERVALS_MS:
                sys.setswitchinterval(interval / 1e3)
                alone = step_ms(model, prompts, 16)
                with busy_process():
                    beside = step_ms(model, prompts, 16)
                with busy_thread():
                    took[interval].append((alone, beside, step_ms(model, prompts, 16), late_ms()))
    finally:
        sys.setswitchinterval(usual_s)
        model.close()
        vocab.close()
    return [
        [f"{interval:g}", *(f"{statistics.median(side):.1f}" for side in zip(*pairs, strict=True))]
        for interval, pairs in took.items()
    ]


def main() -> None:
    """Run and print both tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sampling", description=__doc__)
    parser.add_argument("--vocab", type=int, default=262_144, metavar="N")
    parser.add_argument("--logits-of", type=Path, metavar="FILE", help="a model, in place of random logits")
    parser.add_argument("--slots", type=int, nargs="*", default=[8, 32], help="none leaves the first table out")
    parser.add_argument(
        "--model", type=Path, default=demo_model_path(), metavar="FILE", help="(default: the demo model)"
    )
    parser.add_argument("--threads", type=int, default=usable_cores())
    options = parser.parse_args()
    if options.model is None:
        parser.error("the demo model is not installed; run 'make setup', or give --model FILE")
    if options.slots:
        given = {slots: logits_for(options, slots) for slots in options.slots}
        head = [f"{slots} slots, {how}" for slots in given for how in ("llama.cpp's chain", "orchd")]
        lines = [
            [
                name,
                *(f"{measure(params, logits):.1f}" for logits in given.values() for measure in (whole_ms, chosen_ms)),
            ]
            for name, params in SETTINGS.items()
        ]
        n_vocab = next(iter(given.values())).shape[1]
        table(f"Choosing tokens out of {n_vocab:,}:", ("settings", *head), lines)
    lines = beside_ms(options.model.resolve(), options.threads)
    table(
        f"A step of {STREAMS} sampled streams:",
        ("switch interval, ms", "alone", "beside a busy process", "beside a busy thread", "event loop late"),
        lines,
    )


if __name__ == "__main__":
    main()
