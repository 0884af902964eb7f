"""How far to guess, and what that costs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.api import ALONE, Beside
from engines.llamacpp.guess_cost import _REFRESH, _STALE, GuessCost
from engines.llamacpp.guesser import Guesser, Shares
from engines.llamacpp.lookup import Lookup
from engines.llamacpp.slots import Run
from engines.llamacpp.speculation import DEPTHS, NOTHING, Depth, Speculation, choose
from engines.llamacpp.step_cost import StepCost
from engines.llamacpp.text import OutputText
from tests.engines.support import sequence

LIMIT_S = 0.12


def promise(share: float, most: int = DEPTHS[-1]) -> list[float]:
    """Of guesses that are right so often, each if the one before it is."""
    return list(itertools.accumulate(share**n for n in range(1, most + 1)))


def on_two_cores(guessing: int, guesses: int) -> float:
    """Seconds of a step of one stream, as measured with the demo model (Q4_0)."""
    return float(np.interp(1 + guessing * guesses, [1, 2, 4, 8, 16, 32], [0.0086, 0.0138, 0.0186, 0.0288, 0.052, 0.1]))


def for_free(guessing: int, guesses: int) -> float:
    return 0.01


@pytest.mark.parametrize(("share", "guesses"), [(0.5, 0), (0.6, 0), (0.85, 3), (0.95, 7), (0.99, 15)])
def test_guesses_have_to_pay(share: float, guesses: int) -> None:
    assert choose([promise(share)], on_two_cores, limit_s=LIMIT_S, most_rows=32).guesses == guesses


def test_where_rows_cost_nothing_any_guess_pays() -> None:
    assert choose([promise(0.5)], for_free, limit_s=LIMIT_S, most_rows=32).guesses == DEPTHS[-1]


def test_the_streams_whose_guesses_are_right_most_often_guess() -> None:
    promises = [promise(0.3), promise(0.97), [], promise(0.98)]
    depth = choose(promises, lambda guessing, guesses: 0.01 + 0.001 * guessing * guesses, limit_s=LIMIT_S, most_rows=32)
    assert set(depth.streams) == {1, 3}


def test_no_step_gets_longer_than_it_may() -> None:
    depth = choose([promise(1.0)], on_two_cores, limit_s=0.02, most_rows=32)
    assert depth.guesses == 3
    assert choose([promise(1.0)], on_two_cores, limit_s=0.009, most_rows=32) == NOTHING


def test_no_more_rows_than_there_is_room_for() -> None:
    assert choose([promise(1.0)] * 4, for_free, limit_s=LIMIT_S, most_rows=12).guesses == 3
    assert choose([promise(1.0)] * 4, for_free, limit_s=LIMIT_S, most_rows=0) == NOTHING


def test_a_short_guess_is_not_made_longer() -> None:
    assert choose([promise(1.0, 5)], for_free, limit_s=LIMIT_S, most_rows=32).guesses == 3


@given(
    promises=st.lists(st.builds(promise, st.floats(0.1, 1), st.integers(0, 15)), min_size=1, max_size=16),
    row_s=st.floats(0, 0.01),
    limit_s=st.floats(0.001, 0.5),
    most_rows=st.integers(0, 32),
)
def test_whatever_is_chosen_fits_and_pays(
    promises: list[list[float]], row_s: float, limit_s: float, most_rows: int
) -> None:
    def seconds(guessing: int, guesses: int) -> float:
        return 0.01 + row_s * guessing * guesses

    depth = choose(promises, seconds, limit_s=limit_s, most_rows=most_rows)
    if depth == NOTHING:
        return
    count = len(depth.streams)
    assert count * depth.guesses <= most_rows
    assert seconds(count, depth.guesses) <= limit_s
    tokens = len(promises) + sum(promises[stream][depth.guesses - 1] for stream in depth.streams)
    assert tokens / seconds(count, depth.guesses) > len(promises) / 0.01


def copying(length: int = 200) -> list[int]:
    return list(range(100, 100 + length))


def learnt(text: Sequence[int], *, wrong_every: int = 0, shares: Shares | None = None) -> Guesser:
    """A guesser that has seen a copy of its prompt, with another token in it every so often."""
    guesser = Guesser(Lookup(text), shares or Shares())
    for count, token in enumerate(text[:-20], 1):
        guesser.took(token if not wrong_every or count % wrong_every else 7)
    return guesser


def test_who_copies_is_believed_more_and_more() -> None:
    few, many = (learnt(copying(length)).promise(7)[-1] for length in (30, 200))
    assert 2 < few < many <= 7
    assert many > 6


def test_who_writes_something_new_each_time_is_not() -> None:
    text = [token for n in range(80) for token in (1, 2, 1000 + n)]
    guesser = Guesser(Lookup([1, 2, 3]), Shares())
    before_new = []
    for token in text:
        guesser.took(token)
        if token == 2:
            before_new.append(sum(guesser.promise(1)))
    assert before_new[-1] < 0.15 < before_new[0]


def test_what_one_stream_has_shown_is_expected_of_the_next() -> None:
    shares = Shares()
    unknown = learnt(copying(30), shares=Shares()).promise(7)[-1]
    for _ in range(5):
        learnt(copying(), shares=shares)
    assert learnt(copying(30), shares=shares).promise(7)[-1] > unknown


def test_unlikely_guesses_are_not_promised() -> None:
    guesser = Guesser(Lookup([5, 6, 7, 8, 5]), Shares())
    assert guesser.promise(15) == []
    guesser.took(6)
    assert 0 < len(guesser.promise(15)) < 15


def test_the_price_of_a_shape_is_what_it_took() -> None:
    cost = GuessCost()
    assert cost.seconds(1, 1, 7, plain_s=0.009, row_s=0.002) == pytest.approx(0.023)
    cost.observe(1, 1, 7, plain_s=0.009, seconds=0.029)
    assert cost.seconds(1, 1, 7, plain_s=0.009, row_s=0.002) == 0.029
    assert cost.seconds(1, 1, 3, plain_s=0.009, row_s=0.0) == pytest.approx(0.009 + 3 * 0.02 / 7), "by its rows"


def test_what_a_guess_adds_is_known_by_how_many_streams_there_are() -> None:
    cost = GuessCost()
    cost.observe(1, 1, 7, plain_s=0.015, seconds=0.05)
    assert cost.seconds(8, 2, 1, plain_s=0.04, row_s=0.0) == pytest.approx(0.05), "as beside another number"
    cost.observe(8, 1, 1, plain_s=0.04, seconds=0.06)
    assert cost.seconds(8, 2, 1, plain_s=0.04, row_s=0.0) == pytest.approx(0.08)
    assert cost.seconds(1, 1, 3, plain_s=0.015, row_s=0.0) == pytest.approx(0.03), "as before"


def test_a_first_step_that_took_long_is_no_measure() -> None:
    cost = GuessCost()
    for seconds in (0.5, 0.03, 0.03, 0.03):
        cost.observe(1, 1, 7, plain_s=0.009, seconds=seconds)
    assert cost.seconds(1, 1, 7, plain_s=0.009, row_s=0) == pytest.approx(0.03)


def test_a_shape_that_has_become_slower_costs_more_soon() -> None:
    cost = GuessCost()
    for seconds in [0.03] * 5 + [0.06] * 10:
        cost.observe(1, 1, 7, plain_s=0.009, seconds=seconds)
    assert cost.seconds(1, 1, 7, plain_s=0.009, row_s=0) > 0.055


def test_what_was_measured_long_ago_is_tried_again() -> None:
    cost = GuessCost()
    cost.observe(1, 1, 7, plain_s=0.009, seconds=0.5)
    cost.observe(1, 1, 3, plain_s=0.009, seconds=0.009)
    for _ in range(_STALE):
        cost.plain(1)
    assert cost.seconds(1, 1, 7, plain_s=0.009, row_s=0) < 0.5


def test_a_step_without_guesses_is_measured_now_and_then() -> None:
    cost = GuessCost()
    assert cost.is_plain_due(2), "before the first"
    cost.plain(2)
    for _ in range(_REFRESH):
        assert not cost.is_plain_due(2)
        cost.observe(2, 1, 3, plain_s=0.01, seconds=0.02)
    assert cost.is_plain_due(2)


def stream(text: Sequence[int], speculation: Speculation, *, max_tokens: int = 100, urgent: bool = True) -> Run:
    """It has read a text and written the beginning of it again, up to its last 20 tokens or its first 100."""
    run = Run(sequence(text, max_tokens, urgent=urgent), 0, OutputText((), None, None), None, next_token=text[0])
    run.guesser = speculation.guesser(text)
    for token in text[: min(len(text) - 20, 100)]:
        run.guesser.took(token)
    return run


def stepped(plain_s: float, row_s: float, streams: int = 1) -> Speculation:
    cost = StepCost(LIMIT_S, 512, lone_s=0.5)
    cost.observe(decode_rows=streams, prefill_tokens=0, seconds=plain_s)
    cost.observe(decode_rows=0, prefill_tokens=100, seconds=100 * row_s)
    speculation = Speculation(cost, most_rows=32)
    speculation.observe(streams, NOTHING, plain_s)
    return speculation


def guessed(speculation: Speculation, *runs: Run, beside: Beside = ALONE) -> Depth:
    return speculation.guess(runs, beside, watched=any(run.sequence.urgent for run in runs))


def test_a_stream_that_copies_gets_its_guess() -> None:
    speculation = stepped(0.009, 0.0015)
    speculation.observe(1, Depth(1, (0,)), 0.0105)
    run = stream(copying(), speculation)
    depth = guessed(speculation, run)
    assert depth.streams == (0,)
    assert list(run.guess) == copying()[100:][: depth.guesses]
    assert depth.guesses >= 7


def test_nothing_is_guessed_before_a_plain_step_was_measured() -> None:
    speculation = Speculation(StepCost(LIMIT_S, 512, lone_s=0.5), most_rows=32)
    run = stream(copying(), speculation)
    assert guessed(speculation, run) == NOTHING
    assert not run.guess


def test_no_guess_is_longer_than_the_task_has_room_for() -> None:
    """The last token follows from the last guess, so that one less is guessed than is left."""
    speculation = stepped(0.009, 0.0001)
    for max_tokens, most in ((1, 0), (2, 1), (5, 3)):
        assert guessed(speculation, stream(copying(), speculation, max_tokens=max_tokens)).guesses == most


def test_streams_that_nobody_watches_may_have_longer_steps() -> None:
    speculation = stepped(0.05, 0.02)
    speculation.observe(1, Depth(1, (0,)), 0.07)
    watched, unwatched = (stream(copying(), speculation, urgent=urgent) for urgent in (True, False))
    assert guessed(speculation, watched).guesses <= 3 < guessed(speculation, unwatched).guesses


def test_other_models_on_the_device_take_their_share_of_a_step() -> None:
    speculation = stepped(0.05, 0.02)
    beside = Beside(streams=1, streams_s=0.06)
    assert guessed(speculation, stream(copying(), speculation), beside=beside) == NOTHING


@pytest.mark.parametrize(
    ("price", "pays"),
    [
        (lambda rows: on_two_cores(1, rows - 1), True),
        (lambda rows: 0.009 * rows, False),
        (lambda rows: 0.011 * rows, False),
    ],
    ids=["two cores", "a row costs a step", "sixteen cost more than a step may"],
)
def test_prices_are_found_out_within_some_steps(price: Callable[[int], float], pays: bool) -> None:
    """Copying without an error, 400 steps: at first a row seems to cost as much as one of a long prompt.

    That makes no step too long: the first guesses are few.
    """
    speculation = stepped(price(1), 0.001)
    text = copying(1900)  # as one of more than it takes in at a time would not be known yet
    run = stream(text, speculation, max_tokens=10_000)
    assert run.guesser is not None
    plain, written, seconds = 0, 100, 0.0
    while written < len(text) - 20:
        depth = guessed(speculation, run)
        took_s = price(1 + len(run.guess))
        assert took_s <= LIMIT_S
        seconds += took_s
        plain += not depth.guesses
        if not depth.guesses:
            speculation._steps.observe(decode_rows=1, prefill_tokens=0, seconds=took_s)
        speculation.observe(1, depth, took_s)
        for token in text[written : written + 1 + len(run.guess)]:
            run.guesser.took(token)
        written += 1 + len(run.guess)
        run.guess = ()
    assert (written - 100) / seconds * price(1) > (1.9 if pays else 0.97)
    assert plain > 1700 if not pays else plain < 20
