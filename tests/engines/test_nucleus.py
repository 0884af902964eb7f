"""The bounds hold for sums as llama.cpp adds them: floats, one after another."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.llamacpp import nucleus

Floats = npt.NDArray[np.float32]


def row(seed: int) -> Floats:
    """Logits, some flat and some steep, the highest of them 0."""
    chance = np.random.default_rng(seed)
    logits = chance.normal(0, chance.choice([0.1, 1, 3, 10]), int(chance.integers(1, 30_000)))
    steps: Floats = (logits - logits.max()).astype(np.float32)
    return steps


def exponentials(logits: Floats, seed: int) -> Floats:
    """As a C library may compute them: one unit in the last place more or less."""
    exact = np.exp(logits.astype(np.float64)).astype(np.float32)
    moves = np.random.default_rng(seed).integers(0, 3, len(logits))
    moved: Floats = np.choose(moves, [exact, np.nextafter(exact, np.float32(0)), np.nextafter(exact, np.float32(2))])
    return moved


def bounds_of(logits: Floats) -> list[tuple[float, float]]:
    return list(spread_of(logits).bounds())


def spread_of(logits: Floats) -> nucleus.Spread:
    return nucleus.Spread(logits, logits.max(), np.empty((2, len(logits) + 5), np.float32))


PEAKS = [0, 3, -7, 20.5, 63, -63, 64, -64, 300]
"""Whatever the model adds to all logits, llama.cpp takes away."""


@given(st.integers(0, 1 << 32), st.sampled_from(PEAKS), st.sampled_from([0.1, 0.9, 0.95, 0.99, 0.9999]))
def test_sums_and_counts_are_within_them(seed: int, peak: float, top_p: float) -> None:
    logits = (row(seed) + np.float32(peak)).astype(np.float32)
    theirs = exponentials(logits - logits.max(), seed)
    total = np.cumsum(theirs)[-1]
    everything = nucleus.Leading.of(np.arange(len(logits)), logits, logits.max())
    theirs_ranked = np.sort(theirs)[::-1]
    kept = 1 + int(np.cumsum(theirs_ranked / total).searchsorted(np.float32(top_p)))
    for least, most in bounds_of(logits):
        assert least <= total <= most
        at_least, at_most = everything.kept(top_p, least, most)
        assert at_least <= kept <= at_most
    some = everything.shares[np.random.default_rng(seed).random(len(logits)) < 0.1]
    assert nucleus.at_least(some) <= total


@pytest.mark.parametrize("peak", PEAKS)
def test_each_bound_is_closer_than_the_one_before(peak: float) -> None:
    logits = (row(7) + np.float32(peak)).astype(np.float32)
    apart = [(most - least) / least for least, most in bounds_of(logits)]
    assert apart == sorted(apart, reverse=True)
    assert apart[-1] < 4e-6


@given(st.integers(0, 1 << 32), st.sampled_from(PEAKS), st.sampled_from([0.1, 0.9, 0.99, 0.9999]))
def test_leading_tokens_are_the_likeliest_ones(seed: int, peak: float, top_p: float) -> None:
    logits = (row(seed) + np.float32(peak)).astype(np.float32)
    spread = spread_of(logits)
    leading = spread.leading(top_p, next(spread.bounds())[1])
    if leading is not None:
        assert sorted(leading.logits.tolist()) == np.sort(logits)[-len(leading.ids) :].tolist()
        assert leading.logits.tolist() == sorted(logits[leading.ids].tolist(), reverse=True)
        assert len(set(leading.ids.tolist())) == len(leading.ids)


def test_few_are_ranked_where_few_hold_most() -> None:
    logits = np.random.default_rng(3).normal(-12, 1, 50_003).astype(np.float32)
    logits[[7, 20_000, 50_002]] = 8, 10, 9
    spread = spread_of(logits)
    leading = spread.leading(0.95, next(spread.bounds())[1])
    assert leading is not None
    assert leading.ids.tolist() == [7, 20_000, 50_002]
    assert leading.logits.tolist() == [10, 9, 8]
