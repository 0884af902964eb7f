"""One model on real llama.cpp: how sequences run and end, and what happens when things go wrong."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engines.api import FinishReason, ModelSpec, SamplingParams
from engines.errors import DecodeFailed, EngineDead, LoadFailed
from engines.llamacpp.engine import LlamaCppEngine
from engines.llamacpp.model import LlamaModel
from engines.llamacpp.native.model import NativeModel
from testkit import tiny_gguf
from tests.engines.support import (
    DEVICE,
    GREEDY,
    PROMPTS,
    Output,
    count_rows,
    exact,
    finish,
    loaded,
    output,
    run,
    sequence,
    tokens_of,
)

HOT = SamplingParams(temperature=1.5, top_k=0, top_p=1.0, min_p=0.0, seed=7)


@pytest.fixture(scope="module")
def model(tiny_model_path: Path) -> Iterator[LlamaModel]:
    with loaded(exact(tiny_model_path, slots=4)) as model:
        yield model


@pytest.fixture
def prompt(tiny_model_path: Path) -> tuple[int, ...]:
    return tokens_of(tiny_model_path, PROMPTS[3])


@pytest.fixture(scope="module")
def eog_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf.write_tiny_llama(tmp_path_factory.mktemp("models") / "eog.gguf", eog_likely=True)


def only(model: LlamaModel, prompt: tuple[int, ...], sampling: SamplingParams = GREEDY, n: int = 24) -> Output:
    return run(model, sequence(prompt, n, sampling=sampling))["a"]


def test_a_sequence_ends_by_length(model: LlamaModel, prompt: tuple[int, ...]) -> None:
    output = only(model, prompt, n=5)
    assert output.finish is FinishReason.LENGTH
    assert [event.tokens_out for event in output.events] == [1, 2, 3, 4, 5]
    assert [event.index for event in output.events] == [0, 1, 2, 3, 4]
    assert [event.finish for event in output.events[:-1]] == [None] * 4


def test_a_sequence_ends_by_an_end_of_generation_token_that_does_not_count(eog_path: Path) -> None:
    with loaded(exact(eog_path)) as model:
        outputs = [only(model, tokens_of(eog_path, text), n=200) for text in PROMPTS]
    assert {one.finish for one in outputs} == {FinishReason.STOP}
    for one in outputs:
        assert one.tokens_out == len(one.events) - 1
        assert one.events[-1].text == ""
        assert one.events[-1].index == one.tokens_out - 1


def test_end_of_generation_can_be_ignored(eog_path: Path) -> None:
    with loaded(exact(eog_path)) as model:
        output = only(model, tokens_of(eog_path, PROMPTS[0]), replace(GREEDY, ignore_eos=True), n=200)
    assert (output.finish, output.tokens_out) == (FinishReason.LENGTH, 200)


def test_a_sequence_ends_before_a_stop_string(model: LlamaModel, prompt: tuple[int, ...]) -> None:
    whole = only(model, prompt)
    third = whole.events[3].text.strip()[:2] + whole.events[4].text[:1]  # across a token border
    output = run(model, sequence(prompt, 24, stop=(third,)))["a"]
    assert output.finish is FinishReason.STOP
    assert output.text == whole.text[: whole.text.index(third)]
    assert output.tokens_out <= 5


def test_text_is_whole_characters_even_if_tokens_are_bytes(tmp_path: Path) -> None:
    path = tiny_gguf.write_tiny_llama(tmp_path / "bytes.gguf", bytes_likely=True)
    with loaded(exact(path)) as model:
        output = only(model, tokens_of(path, PROMPTS[0]), n=200)
    assert output.tokens_out == 200
    output.text.encode()
    assert any(not event.text for event in output.events)


def test_cancelling_frees_the_slot_and_silences_the_key(model: LlamaModel, prompt: tuple[int, ...]) -> None:
    for key in "ab":
        model.admit(sequence(prompt, 24, key=key))
    model.step()
    assert (model.free_slots, model.busy) == (2, True)
    assert model.cancel("a")
    assert model.free_slots == 3
    assert not model.cancel("a")
    assert finish(model).keys() == {"b"}


def test_cancelling_while_a_prompt_is_prefilled_leaves_a_usable_slot(tiny_model_path: Path) -> None:
    long = tokens_of(tiny_model_path, " ".join(PROMPTS))
    with loaded(exact(tiny_model_path, batch=16)) as model:
        cold = only(model, long).text
        model.reset()
        model.admit(sequence(long))
        model.step()
        assert model.cancel("a")
        assert model.step() == []
        assert only(model, long).text == cold


def test_a_prompt_longer_than_the_batch_takes_several_steps(
    tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tokens_of(tiny_model_path, " ".join(PROMPTS))
    with loaded(exact(tiny_model_path, batch=512)) as model:
        whole = only(model, long).text
    with loaded(exact(tiny_model_path, batch=32)) as model:
        rows = count_rows(model, monkeypatch)
        assert only(model, long, n=24).text == whole
    assert rows[-23:] == [1] * 23
    assert sum(rows[:-23]) == len(long)
    assert max(rows) == 32


def test_urgent_prompts_are_prefilled_first(tiny_model_path: Path) -> None:
    long = tokens_of(tiny_model_path, " ".join(PROMPTS))
    with loaded(exact(tiny_model_path, slots=2, batch=16)) as model:
        model.admit(sequence(long, key="batch", urgent=False))
        model.admit(sequence(long[::-1], key="urgent"))
        while not (events := output(model.step())):
            pass
        assert [event.key for event in events] == ["urgent"]


def test_the_same_seed_gives_the_same_text(model: LlamaModel, prompt: tuple[int, ...]) -> None:
    assert only(model, prompt, HOT).text == only(model, prompt, HOT).text
    assert only(model, prompt, HOT).text != only(model, prompt, replace(HOT, seed=8)).text


def test_the_highest_seed_is_a_seed_too(model: LlamaModel, prompt: tuple[int, ...]) -> None:
    highest = replace(HOT, seed=2**32 - 1)
    assert len({only(model, prompt, highest).text for _ in range(4)}) == 1


def test_hardly_any_temperature_is_greedy(model: LlamaModel, prompt: tuple[int, ...]) -> None:
    greedy = only(model, prompt).text
    assert only(model, prompt, replace(HOT, temperature=1e-40)).text == greedy
    assert only(model, prompt, replace(HOT, temperature=1e-5)).text == greedy
    assert only(model, prompt, replace(HOT, top_k=1)).text == greedy


def test_a_repeat_penalty_changes_the_output(model: LlamaModel, prompt: tuple[int, ...]) -> None:
    penalised = only(model, prompt, replace(GREEDY, repeat_penalty=5.0), n=100)
    assert penalised.text != only(model, prompt, n=100).text


def test_after_a_failed_step_a_reset_model_works_again(
    model: LlamaModel, prompt: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = only(model, prompt).text
    model.admit(sequence(prompt, key="lost"))
    with monkeypatch.context() as patch:
        patch.setattr(model._context, "decode", _fail)
        with pytest.raises(DecodeFailed):
            model.step()
    model.reset()
    assert (model.free_slots, model.busy) == (4, False)
    assert only(model, prompt).text == expected


def _fail(_n_rows: int) -> None:
    raise DecodeFailed("injected")


def test_an_impossible_token_fails_the_step_and_not_the_process(model: LlamaModel, prompt: tuple[int, ...]) -> None:
    model.admit(sequence([1, 10**6]))
    with pytest.raises(DecodeFailed, match="llama_decode returned -1"):
        model.step()
    model.reset()
    assert only(model, prompt).tokens_out == 24


def test_a_closed_model_says_so(tiny_model_path: Path, prompt: tuple[int, ...]) -> None:
    with loaded(exact(tiny_model_path)) as model:
        model.admit(sequence(prompt))
        model.step()
        model.close()
        model.close()
        with pytest.raises(EngineDead, match=r"tiny-llama\.gguf is closed"):
            model.admit(sequence(prompt))
        with pytest.raises(EngineDead):
            model.reset()
        assert model.step() == []


def test_a_model_computing_nan_is_not_loaded(tmp_path: Path) -> None:
    path = tiny_gguf.write_tiny_llama(tmp_path / "nan.gguf", nan_weights=True)
    with pytest.raises(LoadFailed, match=r"nan\.gguf loads, but its first step fails: .*NaN"):
        LlamaModel(exact(path), DEVICE)


def test_an_embedding_model_is_not_loaded(tmp_path: Path) -> None:
    with pytest.raises(LoadFailed, match=r"tiny-bert\.gguf does not generate text"):
        LlamaModel(exact(tiny_gguf.write_tiny_bert(tmp_path / "tiny-bert.gguf")), DEVICE)


@pytest.mark.parametrize("load", [lambda p: LlamaCppEngine().load(exact(p), DEVICE), LlamaCppEngine().load_vocab])
@pytest.mark.parametrize("content", [b"", b"not a model", b"GGUF\x03\0\0\0"])
def test_what_is_not_a_gguf_is_not_loaded(load: Callable[[Path], object], content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "näme.gguf"
    path.write_bytes(content)
    with pytest.raises(LoadFailed, match=r"näme\.gguf could not be loaded: (?!llama.cpp gave no reason)"):
        load(path)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ({"cache_type_v": "q8_0", "flash_attn": "off"}, "quantized V cache requires flash_attn to be enabled"),
        ({"slots": 300}, "n_seq_max must be <= 256"),
    ],
)
def test_llama_cpps_own_reason_is_told(tiny_model_path: Path, shape: dict[str, Any], reason: str) -> None:
    for load in (lambda spec: LlamaCppEngine().load(spec, DEVICE), LlamaCppEngine().vet):
        with pytest.raises(LoadFailed, match=re.escape(reason)):
            load(ModelSpec(tiny_model_path, **shape))


def test_progress_runs_up_to_one(tiny_model_path: Path) -> None:
    shares: list[float] = []
    LlamaModel(exact(tiny_model_path), DEVICE, on_progress=shares.append).close()
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


@pytest.mark.parametrize("at", [0.0, 1.0])
def test_what_a_progress_callback_raises_ends_the_loading(tiny_model_path: Path, at: float) -> None:
    def give_up(share: float) -> None:
        if share >= at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        NativeModel(tiny_model_path, on_progress=give_up)
