"""Many sequences at once give the text they give alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engines.llamacpp.model import LlamaModel
from testkit import tiny_gguf
from tests.engines.support import PROMPTS, exact, finish, loaded, output, run, sequence, text_of, tokens_of

ROUNDING = 0.01
"""Far more than a logit of these models moves if the rows beside it change (0.001 at most was seen)."""


def run_alone(model: LlamaModel, prompt: tuple[int, ...], max_tokens: int) -> tuple[list[str], list[float]]:
    """The text of each token of a cold run, and by how much each led the second best."""
    model.reset()
    model.admit(sequence(prompt, max_tokens))
    texts: list[str] = []
    leads: list[float] = []
    while model.busy:
        for event in output(model.step()):
            texts.append(event.text)
            second, best = np.sort(model._context.logits(1)[0])[-2:]
            leads.append(float(best - second))
    return texts, leads


@pytest.mark.parametrize("batch", [512, 40, 4], ids=["all at once", "in chunks", "less than the slots"])
@pytest.mark.parametrize("write", [tiny_gguf.write_tiny_llama, tiny_gguf.write_tiny_swa, tiny_gguf.write_tiny_mamba])
def test_sixteen_at_once_give_the_text_they_give_alone(
    write: Callable[[Path], Path], batch: int, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """None of the 16 differed where this was written, and none with 16-bit caches.

    Elsewhere one may, but only from a token on that leads the second best by less than a rounding.
    """
    path = write(tmp_path / "model.gguf")
    prompts = [tokens_of(path, text) for text in PROMPTS]
    spec = exact(path, slots=16, ctx=256, batch=batch)
    with loaded(replace(spec, slots=1)) as model:
        alone = [run_alone(model, prompt, 48) for prompt in prompts]
    with loaded(spec) as model:
        outputs = run(model, *(sequence(prompt, 48, key=str(n)) for n, prompt in enumerate(prompts)))
    differing = 0
    for n, (texts, leads) in enumerate(alone):
        together = [event.text for event in outputs[str(n)].events]
        if together != texts:
            differing += 1
            first = next(i for i in range(48) if together[i] != texts[i])
            assert leads[first] < ROUNDING, f"sequence {n} differs from token {first} on"
    record_property("sequences that differ", differing)
    print(f"{differing} of 16 sequences differ")
    assert differing <= 2
    assert len({"".join(texts) for texts, _ in alone}) == 16


def test_sequences_that_come_and_go_do_not_disturb_the_others(tiny_model_path: Path) -> None:
    prompts = [tokens_of(tiny_model_path, text) for text in PROMPTS]
    with loaded(exact(tiny_model_path, slots=4, batch=24)) as model:
        alone = []
        for n, prompt in enumerate(prompts):
            model.reset()
            alone.append(text_of(model, prompt, 5 + 3 * n))
        model.reset()
        waiting = [sequence(prompt, 5 + 3 * n, key=str(n)) for n, prompt in enumerate(prompts)]
        texts = dict.fromkeys(map(str, range(16)), "")
        cancelled = set()
        while waiting or model.busy:
            while waiting and model.free_slots:
                model.admit(waiting.pop(0))
            for event in output(model.step()):
                assert event.key not in cancelled
                texts[event.key] += event.text
                if int(event.key) % 4 == 3 and event.tokens_out == 6:
                    assert model.cancel(event.key)
                    cancelled.add(event.key)
    assert len(cancelled) == 4
    for n in range(16):
        assert alone[n].startswith(texts[str(n)]) if str(n) in cancelled else alone[n] == texts[str(n)]


def test_a_stream_goes_on_while_a_long_prompt_comes_in(tiny_model_path: Path) -> None:
    long = tokens_of(tiny_model_path, " ".join(PROMPTS))
    with loaded(exact(tiny_model_path, slots=2, batch=32)) as model:
        model.admit(sequence(long[:9], 100, key="stream"))
        model.step()
        model.admit(sequence(long[::-1], key="long"))
        steps = 0
        while "long" not in (keys := {event.key for event in output(model.step())}):
            assert keys == {"stream"}
            steps += 1
        assert steps >= len(long) // 32
        finish(model)
