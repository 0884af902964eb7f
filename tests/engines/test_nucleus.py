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
    logits[[7, 20_000, 50_000, 50_002]] = 8, 10, 8.5, 9
    spread = spread_of(logits)
    leading = spread.leading(0.95, next(spread.bounds())[1])
    assert leading is not None
    assert sorted(leading.ids.tolist()) == [7, 20_000, 50_000, 50_002]
    assert leading.logits.tolist() == [10, 9, 8.5, 8]


@pytest.mark.parametrize("peak", [0, 20.5, -70])
@pytest.mark.parametrize("size", [30_000, 30_007])
@pytest.mark.parametrize("spread", [1, 3, 10])
def test_bounds_are_as_far_apart_as_rounding_can_move_a_sum(peak: float, size: int, spread: float) -> None:
    """By columns of 16 tokens, then by each token and the sum up to the end of its sixteenth of the row."""
    steps = np.random.default_rng(5).normal(0, spread, size)
    logits = (steps - steps.max() + peak).astype(np.float32)
    shares = np.exp((logits - logits.max()).astype(np.float64))
    total, half, other = shares.sum(), 0.51 * 2.0**-23, 100 * 2.0**-23
    whole = size // 16 * 16
    rows, rest = shares[:whole].reshape(16, -1), shares[whole:]
    sums = np.concatenate([rows.sum(axis=0), rest])
    roughly = np.minimum(sums, 16 * half * total).sum()
    added = rows.sum(axis=1).cumsum()
    closely = np.minimum(rows, half * added[:, None]).sum() + np.minimum(rest, half * total).sum()
    found = bounds_of(logits)
    for (least, most), lost in zip(found, (roughly, closely), strict=False):
        assert total - least == pytest.approx(lost + other * total, rel=0.02)
        assert most - total == pytest.approx(lost + other * total, rel=0.02)
    least, most = found[2]
    added_there = np.cumsum(nucleus.shares_of(logits, logits.max()))[-1]
    assert least == pytest.approx(added_there * (1 - 6 * 2.0**-23), rel=1e-6)
    assert most == pytest.approx(added_there * (1 + 6 * 2.0**-23), rel=1e-6)
    assert least < added_there < most


@given(st.integers(0, 1 << 32))
def test_what_some_shares_add_up_to_at_least_is_little_less_than_their_sum(seed: int) -> None:
    some = np.exp(row(seed))
    total = float(some.sum(dtype=np.float64))
    assert total * (1 - (7 + len(some)) * 2.0**-23) < nucleus.at_least(some) < total


@pytest.mark.parametrize("top_p", [0.5, 0.9, 0.99])
def test_of_a_flat_row_not_many_more_are_ranked_than_are_kept(top_p: float) -> None:
    logits = np.random.default_rng(1).normal(0, 3, 40_009).astype(np.float32)
    spread = spread_of(logits)
    for least, most in spread.bounds():
        leading = spread.leading(top_p, most)
        assert leading is not None
        at_least, at_most = leading.kept(top_p, least, most)
        assert at_most <= len(leading.ids) < 4 * at_least
