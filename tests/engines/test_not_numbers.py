"""A sequence for which a model computes NaN ends alone, and nothing of it is left for others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from engines.api import FinishReason, ModelSpec, SamplingParams
from testkit import damaged_gguf, tiny_gguf
from tests.engines.support import GREEDY, PROMPTS, Output, exact, finish, loaded, run, sequence, text_of, tokens_of

WRITERS = [
    tiny_gguf.write_tiny_llama,
    tiny_gguf.write_tiny_swa,
    tiny_gguf.write_tiny_mamba,
    tiny_gguf.write_tiny_lfm2,
]
SAMPLED = SamplingParams(temperature=1.0, seed=3, repeat_penalty=1.1)
BAD = tiny_gguf.IM_START
"""A token that the models here never choose themselves: its logit is 0."""


@pytest.fixture(
    params=[("off", writer) for writer in WRITERS] + [("on", WRITERS[0])],
    ids=lambda param: f"{param[1].__name__}, flash attention {param[0]}",
)
def spec(request: pytest.FixtureRequest, tmp_path: Path) -> ModelSpec:
    """Without flash attention, what is masked is multiplied by 0; with it, most of it is left out."""
    flash_attn, write = request.param
    path = damaged_gguf.without_embedding(write(tmp_path / "model.gguf"), BAD)
    return replace(exact(path, slots=4), flash_attn=flash_attn)


def with_bad(prompt: tuple[int, ...]) -> tuple[int, ...]:
    return (*prompt[:-1], BAD, prompt[-1])


def prompts(spec: ModelSpec) -> list[tuple[int, ...]]:
    return [tokens_of(spec.path, text) for text in PROMPTS[:5]]


def test_it_ends_alone_and_the_others_say_what_they_say_without_it(spec: ModelSpec) -> None:
    *good, other = prompts(spec)[:4]
    with loaded(spec) as model:
        expected = [text_of(model, prompt, 24) for prompt in good]
        model.reset()
        for number, prompt in enumerate(good):
            model.admit(sequence(prompt, 24, key=str(number)))
        outputs: dict[str, Output] = {}
        for _ in range(6):
            for event in model.step():
                outputs.setdefault(event.key, Output()).events.append(event)
        model.admit(sequence(with_bad(other), key="bad"))
        finish(model, outputs)
    assert (outputs["bad"].finish, outputs["bad"].text, outputs["bad"].tokens_out) == (FinishReason.ERROR, "", 0)
    assert [outputs[str(number)].text for number in range(3)] == expected


@pytest.mark.parametrize("bad", [1, 2, 4])
def test_its_slot_gives_the_next_one_the_text_of_a_new_model(spec: ModelSpec, bad: int) -> None:
    asked = prompts(spec)[:4]
    with loaded(spec) as model:
        expected = [text_of(model, prompt) for prompt in asked]
    with loaded(spec) as model:
        keep = asked[0] if bad < 4 else with_bad(asked[0])
        done = run(
            model,
            sequence(keep, 24, key="keep"),
            *(sequence(with_bad(prompt), key=f"bad {n}") for n, prompt in enumerate(asked[1:bad] or asked[1:2])),
        )
        assert [done[key].finish for key in done if key != "keep"] == [FinishReason.ERROR] * max(1, bad - 1)
        again = run(model, *(sequence(prompt, key=str(n)) for n, prompt in enumerate(asked)))
    assert [again[str(n)].text for n in range(4)] == expected


def test_one_that_has_begun_keeps_what_was_said(spec: ModelSpec) -> None:
    (prompt,) = prompts(spec)[:1]
    with loaded(spec) as model:
        expected = text_of(model, prompt, 4)
        model.reset()
        model.admit(sequence(prompt, 24))
        events = [event for _ in range(4) for event in model.step()]
        slot = next(slot for slot in model._slots if slot.run is not None)
        assert slot.run is not None
        slot.run.next_token = BAD
        events += model.step()
    assert "".join(event.text for event in events) == expected
    assert (events[-1].finish, events[-1].tokens_out) == (FinishReason.ERROR, 4)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
def test_a_prompt_that_has_failed_is_computed_anew(spec: ModelSpec, sampling: SamplingParams) -> None:
    """Its tokens are no prefix to go on from, neither for itself nor for others."""
    prompt = with_bad(prompts(spec)[0])
    with loaded(spec) as model:
        for _ in range(2 * spec.slots):
            assert run(model, sequence(prompt, sampling=sampling))["a"].finish is FinishReason.ERROR
            assert all(slot.cached == [] for slot in model._slots)
        assert text_of(model, prompts(spec)[0])


def test_a_lone_slot_is_whole_again(spec: ModelSpec) -> None:
    (prompt,) = prompts(spec)[:1]
    with loaded(replace(spec, slots=1)) as model:
        expected = text_of(model, prompt)
        assert run(model, sequence(with_bad(prompt)))["a"].finish is FinishReason.ERROR
        assert text_of(model, prompt) == expected


def test_nothing_is_saved_of_it(spec: ModelSpec) -> None:
    """A state that is saved before the prompt's last token, for memory that cannot be cut, was saved for good."""
    prompt = with_bad(tuple(range(300, 360)))
    with loaded(replace(spec, swa_full=False)) as model:
        assert run(model, sequence(prompt))["a"].finish is FinishReason.ERROR
        assert model.saved_bytes == 0
        good = prompts(spec)[0]
        expected = text_of(model, good)
        assert run(model, sequence(prompt))["a"].finish is FinishReason.ERROR
        assert text_of(model, good) == expected
