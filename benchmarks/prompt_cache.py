"""What the prompt cache brings and takes: ``python -m benchmarks.prompt_cache {turns,gaps,memory,lookup} [MODEL]``.

The engine alone. ``turns``: conversations of 400 tokens take turns on 4 slots; each turn adds 15 tokens and asks for 8.
``gaps``: the same on 2 slots, while two streams run in the other two, and how long these pause. ``memory``: 1,000
conversations of a tiny model, and the process's resident memory. ``lookup``: among 1,000 saved prompts of 8,000 tokens
and 64 slots.
"""

from __future__ import annotations

import argparse
import logging
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from benchmarks.compare.prompts import Prompts
from benchmarks.compare.stats import percentile
from engines.api import DeviceSpec, ModelSpec, SamplingParams, Sequence
from engines.llamacpp.model import LlamaModel
from engines.llamacpp.prefix_tree import PrefixTree, key_of
from engines.llamacpp.vocab import LlamaVocab
from orchd.machine.cores import usable_cores
from orchd.models.references import demo_model_path
from testkit.tiny_gguf import write_tiny_llama

GREEDY = SamplingParams(temperature=0, ignore_eos=True)
STREAMS = ("stream 1", "stream 2")


class Answer(NamedTuple):
    ttft_s: float
    cached: float


class Side:
    """A model with a prompt cache or without, and when its streams got text."""

    def __init__(self, path: Path, *, mib: int, threads: int) -> None:
        spec = ModelSpec(path, slots=4, ctx=2048, prompt_cache_mib=mib)
        self.model = LlamaModel(spec, DeviceSpec("cpu", threads=threads))
        self.times: dict[str, list[float]] = {key: [] for key in STREAMS}

    def answer(self, tokens: list[int], max_tokens: int = 8) -> Answer:
        """Run one task to its end, beside the streams that run."""
        began, first, cached, done = time.perf_counter(), 0.0, 0, False
        self.model.admit(Sequence("task", tokens, max_tokens, sampling=GREEDY))
        while not done:
            for event in self.model.step():
                if event.key in self.times:
                    self.times[event.key].append(time.perf_counter())
                elif event.tokens_out and not first:
                    first, cached = time.perf_counter() - began, event.tokens_cached
                done |= event.key == "task" and event.finish is not None
        return Answer(first, cached / len(tokens))

    def stream(self, vocab: LlamaVocab, prompts: Prompts) -> None:
        """Start two streams that outlast what is measured."""
        for key in STREAMS:
            self.model.admit(Sequence(key, vocab.tokenize(prompts.text(32)), 1900, sampling=GREEDY))
        for _ in range(30):
            self.model.step()

    def gaps_s(self) -> list[float]:
        return [later - sooner for times in self.times.values() for sooner, later in pairwise(times)]


@contextmanager
def side(path: Path, *, mib: int, threads: int | None = None) -> Iterator[Side]:
    one = Side(path, mib=mib, threads=threads or usable_cores())
    try:
        yield one
    finally:
        one.model.close()


def take_turns(one: Side, vocab: LlamaVocab, prompts: Prompts, options: argparse.Namespace) -> list[Answer]:
    """The answers of all turns but the first."""
    texts = [prompts.text(400) for _ in range(options.conversations)]
    later: list[Answer] = []
    for turn in range(options.turns):
        for number in range(len(texts)):
            texts[number] += prompts.text(15)
            answer = one.answer(vocab.tokenize(texts[number]))
            later += [answer] if turn else []
    return later


def turns(options: argparse.Namespace) -> None:
    vocab = LlamaVocab(options.model)
    for pair in range(options.pairs):
        for mib in (0, 1024):
            with side(options.model, mib=mib) as one:
                answers = take_turns(one, vocab, Prompts(options.model, str(pair)), options)
                saved_mib = one.model.saved_bytes / 2**20
            ttft = [1e3 * answer.ttft_s for answer in answers]
            print(
                f"pair {pair + 1}  prompt_cache_mib {mib:4}  TTFT median {statistics.median(ttft):6.0f} ms, longest "
                f"{max(ttft):6.0f} ms, cached {statistics.mean(answer.cached for answer in answers):4.0%}, "
                f"saved {saved_mib:.0f} MiB",
                flush=True,
            )


def gaps(options: argparse.Namespace) -> None:
    vocab = LlamaVocab(options.model)
    for pair in range(options.pairs):
        for mib in (0, 1024):
            prompts = Prompts(options.model, str(pair))
            with side(options.model, mib=mib) as one:
                one.stream(vocab, prompts)
                answers = take_turns(one, vocab, prompts, options)
            gaps_ms = [1e3 * gap for gap in one.gaps_s()]
            print(
                f"pair {pair + 1}  prompt_cache_mib {mib:4}  gaps: median {statistics.median(gaps_ms):5.1f}, "
                f"p99 {percentile(gaps_ms, 99):5.1f}, longest {max(gaps_ms):5.1f} ms; TTFT median "
                f"{1e3 * statistics.median(answer.ttft_s for answer in answers):5.0f} ms",
                flush=True,
            )


def memory(options: argparse.Namespace) -> None:
    random_, count, mib = random.Random(1), 1000, 32
    with tempfile.TemporaryDirectory() as folder, side(write_tiny_llama(Path(folder) / "m"), mib=mib, threads=1) as one:
        for number in range(count + 1):
            if number in (1, count // 4, count // 2, count):
                print(
                    f"{number:4} conversations  saved {one.model.saved_bytes / 2**20:4.1f} of {mib} MiB, "
                    f"resident {resident_mib():5.1f} MiB",
                    flush=True,
                )
            one.answer([random_.randrange(300, 700) for _ in range(400)])


def resident_mib() -> float:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) / 1024


def lookup(options: argparse.Namespace) -> None:
    _look_up("conversations that begin with one of ten instructions", 10, lambda random_: 1_000)
    _look_up("beginnings of one prompt, each of another length", 1, lambda random_: random_.randrange(8_000))


def _look_up(what: str, roots: int, shared_by: Callable[[random.Random], int]) -> None:
    """Among 1,000 saved prompts, which share so many tokens with one of a few, and 64 slots with some of them."""
    random_ = random.Random(1)

    def tokens(count: int) -> list[int]:
        return [random_.randrange(100_000) for _ in range(count)]

    prompts = [tokens(8_000) for _ in range(roots)]
    tree: PrefixTree[int] = PrefixTree()
    for entry in range(1_000):
        shared = shared_by(random_)
        tree.add(entry, key_of([*prompts[entry % roots][:shared], *tokens(8_000 - shared)]))
    for slot in range(64):
        tree.place(slot, key_of(prompts[slot % roots][: shared_by(random_)]))
    times_s = []
    for number in range(1_000):
        began = time.perf_counter()
        tree.match(key_of(prompts[number % roots]))
        times_s.append(time.perf_counter() - began)
    print(f"{what}: median {statistics.median(times_s) * 1e6:.0f} µs, p99 {percentile(times_s, 99) * 1e6:.0f} µs")


MEASURED = {"turns": turns, "gaps": gaps, "memory": memory, "lookup": lookup}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measure", choices=MEASURED)
    parser.add_argument("model", type=Path, nargs="?", default=demo_model_path(), help="for turns and gaps")
    parser.add_argument("--conversations", type=int, default=12)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()
    logging.getLogger("engines.llamacpp").setLevel(logging.ERROR)
    MEASURED[options.measure](options)


if __name__ == "__main__":
    main()
