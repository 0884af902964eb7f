"""The formulae of the side-by-side benchmark."""

from __future__ import annotations

import math
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.compare.stats import (
    Ratio,
    Sample,
    Target,
    latencies,
    paired_ratio,
    percentile,
    summarise,
    within,
)

values = st.lists(st.floats(min_value=-1e6, max_value=1e6), min_size=1, max_size=50)


@pytest.mark.parametrize(
    ("percent", "expected"), [(0.1, 15), (5, 15), (30, 20), (40, 20), (50, 35), (99, 50), (100, 50)]
)
def test_a_percentile_is_the_nearest_rank(percent: float, expected: float) -> None:
    assert percentile([50, 15, 40, 20, 35], percent) == expected


@given(values, st.integers(min_value=1, max_value=100))
def test_a_percentile_is_the_least_value_that_so_many_are_not_above(given_values: list[float], percent: int) -> None:
    result = percentile(given_values, percent)
    assert result in given_values
    assert 100 * sum(value <= result for value in given_values) >= percent * len(given_values)
    assert 100 * sum(value < result for value in given_values) < percent * len(given_values)


def test_the_99th_percentile_of_a_few_requests_is_the_slowest() -> None:
    assert percentile([3.0, 9.0, 1.0], 99) == 9.0


@pytest.mark.parametrize(("given_values", "percent"), [([], 50), ([1.0], 0), ([1.0], 101)])
def test_a_percentile_of_nothing_or_outside_the_scale_is_an_error(given_values: list[float], percent: float) -> None:
    with pytest.raises(ValueError, match="percentile"):
        percentile(given_values, percent)


def test_a_paired_ratio_is_the_median_of_the_pairs_ratios_not_the_ratio_of_the_medians() -> None:
    # On a machine that slows down, each pair still tells the same.
    assert paired_ratio([10, 20, 90], [20, 40, 100]) == Ratio(median=0.5, low=0.5, high=0.9)


def test_there_is_no_ratio_to_nothing() -> None:
    assert paired_ratio([1.0, 2.0], [0.0, 1.0]) is None


@pytest.mark.parametrize(("ours", "theirs"), [([1.0], [1.0, 2.0]), ([], [])])
def test_values_that_are_no_pairs_are_an_error(ours: list[float], theirs: list[float]) -> None:
    with pytest.raises(ValueError, match="no pairs"):
        paired_ratio(ours, theirs)


@given(values, st.floats(min_value=0.125, max_value=8))
def test_a_server_that_is_as_much_faster_in_each_pair_has_that_ratio(theirs: list[float], factor: float) -> None:
    theirs = [abs(value) + 1 for value in theirs]
    ratio = paired_ratio([factor * value for value in theirs], theirs)
    assert ratio is not None
    assert ratio.low <= ratio.median <= ratio.high
    assert ratio.median == pytest.approx(factor)


def test_rates_are_over_the_time_from_the_first_request_to_the_last_token() -> None:
    samples = [Sample(10.0, (10.5, 11.0), tokens=2), Sample(11.0, (11.5, 12.0, 14.0), tokens=6)]
    figures = summarise(samples)
    assert figures["tokens_per_s"] == 8 / 4
    assert figures["requests_per_s"] == 2 / 4


def test_latencies_are_taken_over_all_requests_and_all_gaps() -> None:
    samples = [Sample(0.0, (1.0, 1.25, 1.5), tokens=3), Sample(0.0, (2.0, 2.0, 4.0), tokens=3)]
    assert latencies(samples) == {
        "ttft_p50_ms": 1000,
        "ttft_p99_ms": 2000,
        "itl_p50_ms": 250,
        "itl_p99_ms": 2000,
        "itl_max_ms": 2000,
    }


def test_a_single_token_has_no_gap() -> None:
    assert latencies([Sample(0.0, (0.5,), tokens=1)]) == {"ttft_p50_ms": 500, "ttft_p99_ms": 500}


def test_no_gap_reaches_over_the_edge_of_a_window() -> None:
    cut = within(Sample(0.0, (1.0, 4.0, 5.0, 6.0, 9.0), tokens=99), 3.0, 7.0)
    assert cut.gaps_s == [1.0, 1.0]
    assert cut.tokens == 3


Direction = Literal["at least", "at most"]


@pytest.mark.parametrize(
    ("direction", "value", "met"),
    [("at least", 1.0, True), ("at least", 0.999, False), ("at most", 1.0, True), ("at most", 1.001, False)],
)
def test_a_target_holds_at_its_bound(direction: Direction, value: float, met: bool) -> None:
    assert Target("tokens_per_s", direction, 1.0).met_by(value) is met


@pytest.mark.parametrize("direction", ["at least", "at most"])
def test_nothing_measured_meets_no_target(direction: Direction) -> None:
    assert not Target("tokens_per_s", direction, 1.0).met_by(math.nan)
