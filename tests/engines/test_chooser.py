"""A token is the one that llama.cpp's own chain of samplers draws from the whole row, however it was found."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engines.api import SamplingParams
from engines.llamacpp import chooser as chooser_module
from engines.llamacpp.chooser import SMALL, Chooser
from engines.llamacpp.draw import Uniforms, draw
from engines.llamacpp.native.sampler import Candidates, NativeSampler
from engines.llamacpp.sampling import Sampler, is_argmax

Floats = npt.NDArray[np.float32]

N_VOCAB = 20_011
"""Above `chooser.SMALL`, and no multiple of anything."""


class Reference:
    """The chain as llama.cpp's own programs build and call it: every link looks at every candidate."""

    def __init__(self, params: SamplingParams, n_vocab: int, prompt: Sequence[int]) -> None:
        self._chain: Any = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        links = []
        if params.repeat_penalty != 1:
            links.append(llama_cpp.llama_sampler_init_penalties(n_vocab, 64, params.repeat_penalty, 0.0, 0.0))
            for token in prompt[-64:]:
                llama_cpp.llama_sampler_accept(links[0], token)
        if params.temperature == 0:
            links.append(llama_cpp.llama_sampler_init_greedy())
        else:
            if params.top_k:
                links.append(llama_cpp.llama_sampler_init_top_k(params.top_k))
            links += [
                llama_cpp.llama_sampler_init_top_p(params.top_p, 1),
                llama_cpp.llama_sampler_init_min_p(params.min_p, 1),
                llama_cpp.llama_sampler_init_temp(params.temperature),
                llama_cpp.llama_sampler_init_dist(params.seed),
            ]
        for link in links:
            llama_cpp.llama_sampler_chain_add(self._chain, link)

    def token(self, logits: Floats) -> int:
        candidates = np.zeros(len(logits), np.dtype(llama_cpp.llama_token_data))
        candidates["id"], candidates["logit"] = np.arange(len(logits)), logits
        data = candidates.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token_data))
        array = llama_cpp.llama_token_data_array(data=data, size=len(logits), selected=-1, sorted=False)
        llama_cpp.llama_sampler_apply(self._chain, ctypes.byref(array))
        token = int(candidates["id"][array.selected])
        llama_cpp.llama_sampler_accept(self._chain, token)
        return token

    def close(self) -> None:
        llama_cpp.llama_sampler_free(self._chain)


Shape = tuple[float, float, int | None, float]
"""Deviation of the logits, share of tokens that stand out, decimals they are rounded to, and share ruled out."""


def row(shape: Shape, seed: int) -> Floats:
    """Logits as models make them, flat ones, many equal ones, and with tokens that are ruled out."""
    deviation, outstanding, decimals, ruled_out = shape
    chance = np.random.default_rng(seed)
    logits = chance.normal(-5, deviation, N_VOCAB) + (chance.random(N_VOCAB) < outstanding) * chance.exponential(
        6, N_VOCAB
    )
    logits = logits if decimals is None else logits.round(decimals)
    logits[chance.random(N_VOCAB) < ruled_out] = -np.inf
    logits[chance.integers(N_VOCAB)] = 0
    return logits.astype(np.float32)


shapes = st.tuples(
    st.sampled_from([0.01, 1, 2.5, 8]),
    st.sampled_from([0, 3e-3, 0.1]),
    st.sampled_from([None, None, 2, 0]),
    st.sampled_from([0, 0, 0.9, 0.9999]),
)
asked = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0, 0.01, 0.8, 1, 1.7, 5]),
    top_k=st.sampled_from([0, 0, 1, 2, 40, 100, 200, 312, 313, 5000, N_VOCAB, 2**31 - 1]),
    top_p=st.sampled_from([1e-50, 0.1, 0.9, 0.95, 0.99, 0.9999, 1 - 1e-9, 1]),
    min_p=st.sampled_from([0, 0, 1e-300, 1e-6, 1e-3, 0.05, 0.9, 1]),
    repeat_penalty=st.sampled_from([1, 1, 0.5, 1.1, 10]),
    seed=st.integers(0, 2**32 - 2),
)
PROMPT = list(range(7, 150, 2))
PEAKED: Shape = (2.5, 3e-3, None, 0)


@given(
    st.lists(asked, min_size=1, max_size=3), shapes, st.sampled_from([0, 0, 30, -80, 200]), st.integers(0, 2**32 - 1)
)
@example([SamplingParams(top_k=0, min_p=0)], (2.5, 3e-3, None, 0), 0, 1)
@example([SamplingParams(top_k=0, min_p=0, top_p=0.9999)], (1, 0, None, 0), 30, 1)
@example([SamplingParams(top_k=0, min_p=0, top_p=1)], (8, 0, None, 0), -80, 1)
@settings(max_examples=150, deadline=None)
def test_the_same_tokens_as_from_the_whole_row(
    params: list[SamplingParams], shape: Shape, raised: float, seed: int
) -> None:
    """Several steps, so that a draw too few or too many is found by the next one."""
    chooser = Chooser([])
    with contextlib.ExitStack() as stack:
        samplers = [None if is_argmax(one) else Sampler(one, prompt=PROMPT) for one in params]
        references = [Reference(one, N_VOCAB, PROMPT) for one in params]
        for owner in (*samplers, *references):
            if owner is not None:
                stack.callback(owner.close)
        for step in range(6):
            logits = np.stack([row(shape, (seed + 97 * step + number) % 2**32) for number in range(len(params))])
            logits += np.float32(raised)
            expected = [reference.token(one) for reference, one in zip(references, logits, strict=True)]
            assert chooser.choose(logits, samplers) == expected


FILTERS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "penalty": {"repeat_penalty": 1.1},
    "every token, by min_p": {"top_k": 0},
    "by min_p alone": {"top_k": 0, "top_p": 1},
}


@pytest.mark.parametrize("asked_for", FILTERS.values(), ids=FILTERS)
def test_a_whole_row_is_not_ranked_for_usual_settings(
    asked_for: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def whole(self: object, number: int) -> int:
        raise AssertionError(f"row {number} was handed over whole")

    monkeypatch.setattr(chooser_module._Drawing, "_from_all", whole)
    monkeypatch.setattr(chooser_module._Drawing, "_nucleus", whole)
    with contextlib.closing(Sampler(SamplingParams(seed=1, **asked_for), prompt=PROMPT)) as sampler:
        for seed in range(20):
            assert Chooser([]).choose(row(PEAKED, seed)[None], [sampler]) != [None]


@pytest.mark.parametrize("asked_for", [{"min_p": 0}, {"min_p": 0, "top_p": 0.99}, {"min_p": 0, "top_p": 1}], ids=str)
def test_a_whole_row_is_seldom_ranked_for_others(asked_for: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    count, whole = 0, chooser_module._Drawing._from_all

    def counted(self: chooser_module._Drawing, number: int) -> int:
        nonlocal count
        count += 1
        return whole(self, number)

    monkeypatch.setattr(chooser_module._Drawing, "_from_all", counted)
    with contextlib.closing(Sampler(SamplingParams(seed=1, top_k=0, **asked_for))) as sampler:
        for seed in range(100):
            Chooser([]).choose(row(PEAKED, seed)[None], [sampler])
    assert count <= 5


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("params", [SamplingParams(temperature=0), SamplingParams(), SamplingParams(top_k=0)], ids=str)
@pytest.mark.parametrize("token", [0, SMALL, N_VOCAB - 1])
def test_a_row_that_is_not_numbers_has_no_token_and_harms_no_other(
    value: float, params: SamplingParams, token: int
) -> None:
    def drawn(damaged: bool) -> list[int | None]:
        samplers = [None if is_argmax(params) else Sampler(params) for _ in range(3)]
        logits = np.stack([row(PEAKED, number) for number in range(3)])
        if damaged:
            logits[1, token] = value
        tokens = Chooser([]).choose(logits, samplers)
        for sampler in samplers:
            if sampler is not None:
                sampler.close()
        return tokens

    first, _, last = drawn(damaged=False)
    assert drawn(damaged=True) == [first, None, last]


def test_where_every_token_is_ruled_out_there_is_none() -> None:
    with contextlib.closing(Sampler(SamplingParams())) as sampler:
        assert Chooser([]).choose(np.full((1, N_VOCAB), -np.inf, np.float32), [sampler]) == [None]


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=0), SamplingParams(top_k=0, top_p=1)])
@pytest.mark.parametrize("n_vocab", [300, N_VOCAB])
def test_ends_are_chosen_unless_they_are_ruled_out(params: SamplingParams, n_vocab: int) -> None:
    logits = np.zeros((1, n_vocab), np.float32)
    logits[0, [5, 7]] = 1000
    for ignore_eos, expected in ((False, {5, 7}), (True, set(range(n_vocab)) - {5, 7})):
        asked_for = SamplingParams(**{**vars(params), "ignore_eos": ignore_eos})
        with contextlib.closing(Sampler(asked_for)) as sampler:
            assert Chooser([5, 7]).choose(logits.copy(), [sampler])[0] in expected


def test_random_numbers_are_those_of_llama_cpp() -> None:
    """Of two equal tokens the first is drawn by those up to a half."""
    logits = np.zeros(2, np.float32)
    params = SamplingParams(temperature=1, top_k=0, top_p=1, min_p=0, seed=12)
    reference, uniforms = Reference(params, 2, []), Uniforms(12)
    assert [reference.token(logits) for _ in range(200)] == [int(uniforms.next() > 0.5) for _ in range(200)]
    reference.close()


def test_a_draw_at_the_border_of_two_tokens_is_left_to_llama_cpp() -> None:
    logits = np.zeros(10_000, np.float32)
    room = np.empty_like(logits)

    def at(uniform: float) -> int | None:
        return draw(logits, np.float32(0), uniform, temperature=1, scratch=room)

    assert [at(0.5), at(0.5 + 1e-7), at(0.5 - 1e-7), at(0.50005)] == [None, None, None, 5000]
    assert [at(0.0), at(5e-5), at(1 - 5e-5)] == [0, 0, 9999]


@pytest.mark.parametrize("n_vocab", [1000, 40_000])
def test_a_draw_that_was_taken_back_goes_on_whatever_the_vocabulary_s_size(n_vocab: int) -> None:
    """Above `native.sampler.SHORT` it is another function of llama.cpp's that is called."""
    sampler = NativeSampler(top_k=40, top_p=0.95, min_p=0.05, temperature=1, seed=7)
    candidates = Candidates()

    def choose() -> int:
        candidates.fill(np.arange(n_vocab), np.sin(np.arange(n_vocab, dtype=np.float32)))
        return sampler.choose(candidates)

    saved = sampler.saved_draw()
    first = [choose(), choose()]
    sampler.restore_draw(saved)
    assert [choose(), choose()] == first
