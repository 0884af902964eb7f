"""What the prompt cache brings conversations that outnumber the slots: ``python -m benchmarks.prompt_cache MODEL``.

The engine alone, with and without, in turn: conversations of 400 tokens take turns on 4 slots; each turn adds 15 tokens
and asks for 8. Printed is the time to the first token, from the second turn on, and how many prompt tokens were cached.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.compare.prompts import Prompts
from engines.api import DeviceSpec, ModelSpec, SamplingParams, Sequence
from engines.llamacpp.model import LlamaModel
from engines.llamacpp.vocab import LlamaVocab
from orchd.machine.devices import usable_cores

GREEDY = SamplingParams(temperature=0, ignore_eos=True)


class Answer(NamedTuple):
    ttft_s: float
    cached: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--conversations", type=int, default=12)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()
    logging.getLogger("engines.llamacpp").setLevel(logging.ERROR)
    vocab = LlamaVocab(options.model)
    for pair in range(options.pairs):
        for mib in (0, 1024):
            spec = ModelSpec(options.model, slots=4, ctx=2048, prompt_cache_mib=mib)
            model = LlamaModel(spec, DeviceSpec("cpu", threads=usable_cores()))
            answers, saved_mib = run(model, vocab, options, seed=str(pair))
            model.close()
            ttft = [1e3 * answer.ttft_s for answer in answers]
            print(
                f"pair {pair + 1}  prompt_cache_mib {mib:4}  TTFT median {statistics.median(ttft):6.0f} ms, longest "
                f"{max(ttft):6.0f} ms, cached {statistics.mean(answer.cached for answer in answers):4.0%}, "
                f"saved {saved_mib:.0f} MiB",
                flush=True,
            )


def run(model: LlamaModel, vocab: LlamaVocab, options: argparse.Namespace, *, seed: str) -> tuple[list[Answer], float]:
    """The answers of all turns but the first, and what is saved at the end."""
    prompts = Prompts(options.model, seed)
    texts = [prompts.text(400) for _ in range(options.conversations)]
    later: list[Answer] = []
    for turn in range(options.turns):
        for number in range(len(texts)):
            texts[number] += prompts.text(15)
            one = answer(model, vocab.tokenize(texts[number]))
            later += [one] if turn else []
    return later, model.saved_bytes / 2**20


def answer(model: LlamaModel, tokens: list[int]) -> Answer:
    """Run one task to its end."""
    began, first, cached = time.perf_counter(), 0.0, 0
    model.admit(Sequence("a", tokens, 8, sampling=GREEDY))
    while model.busy:
        for event in model.step():
            if event.tokens_out and not first:
                first, cached = time.perf_counter() - began, event.tokens_cached
    return Answer(first, cached / len(tokens))


if __name__ == "__main__":
    main()
