"""A shortlist holds every token that a sampler could choose, and a sampler chooses from it as from the vocabulary."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.api import ModelSpec, SamplingParams
from engines.llamacpp import chooser
from engines.llamacpp.shortlist import FOLD, Columns
from tests.engines.support import Output, loaded, run, sequence, tokens_of

Floats = npt.NDArray[np.float32]
SAMPLED = SamplingParams(temperature=0.8, seed=7)


@st.composite
def rows(draw: st.DrawFn) -> Floats:
    """Logits as models make them, with more ties, and with tokens that are ruled out."""
    n = draw(st.integers(FOLD, 40 * FOLD))
    numbers = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    logits = numbers.normal(0, draw(st.sampled_from([0.1, 3, 20])), n).astype(np.float32)
    logits = logits.round(draw(st.sampled_from([0, 1, 6])))
    logits[numbers.random(n) < draw(st.sampled_from([0, 0.1, 0.99, 1]))] = -np.inf
    return logits


@given(st.lists(rows(), min_size=1, max_size=3), st.integers(1, 40))
def test_all_that_are_as_likely_as_the_kth_are_on_it(listed: list[Floats], k: int) -> None:
    width = min(map(len, listed))
    logits = np.stack([row[:width] for row in listed])
    columns = Columns(logits)
    k = min(k, columns.count)
    numbers = list(range(len(listed)))
    least = list(columns.kth(dict.fromkeys(numbers, k)).values())
    for row, floor, (ids, found) in zip(logits, least, columns.reaching(numbers, least), strict=True):
        assert np.sort(row)[-k] >= floor
        assert ids.tolist() == np.flatnonzero(row >= floor).tolist()
        assert found.tolist() == row[ids].tolist()


@pytest.mark.parametrize("n_vocab", [32_000, 49_152, 128_256, 151_936, 262_144])
def test_it_is_short(n_vocab: int) -> None:
    columns = Columns(np.random.default_rng(n_vocab).normal(0, 3, (1, n_vocab)).astype(np.float32))
    ((ids, _),) = columns.reaching([0], [columns.kth({0: 40})[0]])
    assert 40 <= len(ids) <= 80


@given(st.lists(rows(), min_size=1, max_size=3))
def test_the_peaks_are_those_of_the_whole_rows(listed: list[Floats]) -> None:
    width = min(map(len, listed))
    logits = np.stack([row[:width] for row in listed])
    assert Columns(logits).peaks().tolist() == logits.max(axis=1).tolist()


@pytest.mark.parametrize("slots", [1, 4])
def test_sampled_text_is_the_same_with_and_without(
    smollm2_path: Path, monkeypatch: pytest.MonkeyPatch, slots: int
) -> None:
    """At temperature 2 from 100 tokens, where the likeliest is seldom chosen."""
    texts = ("The capital of France is", "Once upon a time", "Name three rivers.", "Water boils at")[:slots]
    params = [replace(SAMPLED, temperature=2.0, top_k=100, min_p=0.0, seed=seed) for seed in range(slots)]
    asked = [
        sequence(tokens_of(smollm2_path, text), 32, key=text, sampling=one)
        for text, one in zip(texts, params, strict=True)
    ]

    def outputs(small: int) -> dict[str, Output]:
        monkeypatch.setattr(chooser, "SMALL", small)
        with loaded(ModelSpec(smollm2_path, slots=slots, ctx=256)) as model:
            return run(model, *asked)

    assert outputs(0) == outputs(1 << 40)
    assert len({output.text for output in outputs(0).values()}) == slots


@pytest.mark.parametrize("small", [0, 1 << 40])
def test_a_sampled_text_goes_on_where_its_end_is_forbidden(
    smollm2_path: Path, monkeypatch: pytest.MonkeyPatch, small: int
) -> None:
    monkeypatch.setattr(chooser, "SMALL", small)
    prompt = tokens_of(smollm2_path, "<|im_start|>user\nSay yes.<|im_end|>\n<|im_start|>assistant\n")
    with loaded(ModelSpec(smollm2_path, slots=2, ctx=256)) as model:
        free, endless = (
            sequence(prompt, 120, key=key, sampling=replace(SAMPLED, ignore_eos=ignore))
            for key, ignore in (("free", False), ("endless", True))
        )
        done = run(model, free, endless)
    assert done["free"].tokens_out < 120
    assert done["endless"].tokens_out == 120
