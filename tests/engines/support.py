"""Models of a small shape, and sequences run on them to their end."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import pytest

from benchmarks.gpu.worker_share import spec_of
from engines import api
from engines.api import FinishReason, ModelSpec, SamplingParams, StepEvent
from engines.llamacpp.model import LlamaModel
from engines.llamacpp.vocab import LlamaVocab
from testkit.tiny_gguf import PIECES

DEVICE = spec_of(os.environ.get("ORCHD_TEST_DEVICE", "cpu"))
"""Where models are loaded: what is said here of one on a CPU holds on a GPU as well (``make test-device``)."""

GREEDY = SamplingParams(temperature=0)
EXACT = ModelSpec(
    Path(),
    slots=1,
    ctx=512,
    batch=64,
    flash_attn="off",
    cache_type_k="f32",
    cache_type_v="f32",
    speculate=False,
)
"""Everything in 32 bits: a rounding moves the logits of a tiny model by 0.001 at most, and hardly ever its text. One
token a step, whatever time it takes."""

PROMPTS = [" ".join([*PIECES[10 * n : 11 * n + 1], "and the river"]).replace("▁", "") for n in range(16)]


@contextmanager
def loaded(spec: ModelSpec) -> Iterator[LlamaModel]:
    model = LlamaModel(spec, DEVICE)
    try:
        yield model
    finally:
        model.close()


def exact(path: Path, *, slots: int = 1, ctx: int = 512, batch: int = 64, swa_full: bool = True) -> ModelSpec:
    return replace(EXACT, path=path, slots=slots, ctx=ctx, batch=batch, swa_full=swa_full)


@lru_cache
def tokens_of(path: Path, prompt: str) -> tuple[int, ...]:
    vocab = LlamaVocab(path)
    tokens = vocab.tokenize(prompt)
    vocab.close()
    return tuple(tokens)


def sequence(
    tokens: Sequence[int],
    max_tokens: int = 16,
    *,
    key: str = "a",
    stop: tuple[str, ...] = (),
    sampling: SamplingParams = GREEDY,
    urgent: bool = True,
    reply: str | None = None,
) -> api.Sequence:
    return api.Sequence(key, tokens, max_tokens, stop=stop, sampling=sampling, urgent=urgent, reply=reply)


@dataclass
class Output:
    events: list[StepEvent] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events)

    @property
    def finish(self) -> FinishReason | None:
        return self.events[-1].finish

    @property
    def tokens_out(self) -> int:
        return self.events[-1].tokens_out


def output(events: Iterable[StepEvent]) -> list[StepEvent]:
    """Those that are not only about a prompt."""
    return [event for event in events if event.tokens_out or event.finish]


def finish(model: LlamaModel, outputs: dict[str, Output] | None = None) -> dict[str, Output]:
    """Step until all is done; what every step must keep to is checked here."""
    outputs = {} if outputs is None else outputs
    while model.busy:
        events = model.step()
        assert len({event.key for event in events}) == len(events)
        for event in output(events):
            seen = outputs.setdefault(event.key, Output())
            assert seen.events == [] or seen.finish is None
            seen.events.append(event)
    return outputs


def run(model: LlamaModel, *sequences: api.Sequence) -> dict[str, Output]:
    for one in sequences:
        model.admit(one)
    return finish(model)


def text_of(model: LlamaModel, tokens: Sequence[int], max_tokens: int = 16) -> str:
    return run(model, sequence(tokens, max_tokens))["a"].text


def count_rows(model: LlamaModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each step from now on."""
    rows: list[int] = []
    decode = model._context.decode

    def counted(n_rows: int) -> None:
        rows.append(n_rows)
        decode(n_rows)

    monkeypatch.setattr(model._context, "decode", counted)
    return rows
