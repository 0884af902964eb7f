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


@given(st.integers(0, 1 << 32), st.sampled_from([0.1, 0.9, 0.95, 0.99, 0.9999]))
def test_sums_and_counts_are_within_them(seed: int, top_p: float) -> None:
    logits = row(seed)
    theirs = exponentials(logits, seed)
    total = np.cumsum(theirs)[-1]
    shares = nucleus.shares_of(logits, np.float32(0))
    room = np.empty_like(shares)
    for least, most in (nucleus.roughly(shares, room), nucleus.tightly(shares, room)):
        assert least <= total <= most
        ranked, theirs_ranked = np.sort(shares)[::-1], np.sort(theirs)[::-1]
        kept = 1 + int(np.cumsum(theirs_ranked / total).searchsorted(np.float32(top_p)))
        assert nucleus.kept_at_least(ranked, top_p, least) <= kept <= nucleus.kept_at_most(ranked, top_p, most)
    some = shares[np.random.default_rng(seed).random(len(shares)) < 0.1]
    assert nucleus.at_least(some) <= total


def test_the_tight_bounds_are_tight() -> None:
    shares = nucleus.shares_of(row(7), np.float32(0))
    room = np.empty_like(shares)
    (least, most), (tight_least, tight_most) = nucleus.roughly(shares, room), nucleus.tightly(shares, room)
    assert (tight_most - tight_least) / least < 4e-6 < (most - least) / least


@pytest.mark.parametrize(("floor", "ids"), [(0.5, [2, 0]), (0.01, [2, 0, 3, 1])])
def test_ranked_tokens_are_those_that_reach_the_floor(floor: float, ids: list[int]) -> None:
    logits = np.array([-0.5, -4, 0, -1], np.float32)
    found, values = nucleus.ranked(logits, np.exp(logits), np.float32(floor))
    assert found is not None
    assert found.tolist() == ids
    assert values.tolist() == logits[ids].tolist()
