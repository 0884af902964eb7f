"""What is left of a task, and when slots come free: by hand, by brute force, and in every mix of lengths."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchd.queue.forecast import FIRST_LENGTH, MAX_PLANNED, WINDOW, Forecast, Lengths, Plan, Running
from testkit.builders import make_task

quantiles = st.floats(0, 1, exclude_max=True)


def lengths(*stopped: int, cut: tuple[int, ...] = ()) -> Lengths:
    known = Lengths()
    for tokens in stopped:
        known.add(tokens, cut=False)
    for tokens in cut:
        known.add(tokens, cut=True)
    return known


def rests(known: Lengths, written: int, max_tokens: int) -> set[int]:
    return {known.rest(written, max_tokens, quantile=number / 100) for number in range(100)}


# --- lengths ----------------------------------------------------------------------------------------------------------


def test_before_any_task_has_ended_a_guess_is_made_within_max_tokens() -> None:
    assert rests(lengths(), 0, 10_000) == {FIRST_LENGTH}
    assert rests(lengths(), 0, 20) == {20}
    assert rests(lengths(), FIRST_LENGTH + 50, 10_000) == {FIRST_LENGTH + 50}


def test_a_task_is_like_those_that_wrote_more_than_it_has() -> None:
    known = lengths(*[20] * 10, *[1500] * 10)
    assert rests(known, 0, 2000) == {20, 1500}
    assert rests(known, 19, 2000) == {1, 1481}
    assert rests(known, 30, 2000) == {1470}
    assert known.rest(0, 2000, quantile=0.49) == 20
    assert known.rest(0, 2000, quantile=0.51) == 1500


def test_a_task_that_has_outlived_all_others_lasts_as_long_again() -> None:
    assert rests(lengths(20, 30), 100, 2000) == {100}
    assert rests(lengths(20, 30), 1800, 2000) == {200}


def test_where_all_were_cut_off_a_task_goes_on_to_its_own_max_tokens() -> None:
    assert rests(lengths(cut=(20, 20, 20)), 5, 1500) == {1495}


def test_one_that_was_cut_off_counts_as_one_among_the_others() -> None:
    known = lengths(*[100] * 9, cut=(4000,))
    assert known.rest(0, 4000, quantile=0.89) == 100
    assert known.rest(0, 4000, quantile=0.91) == 4000
    assert rests(known, 200, 4000) == {200, 3800}


def test_old_lengths_are_forgotten() -> None:
    known = lengths(*[20] * WINDOW, *[200] * WINDOW)
    assert rests(known, 0, 1000) == {200}


@given(
    stopped=st.lists(st.integers(0, 3000), max_size=80),
    cut=st.lists(st.integers(1, 3000), max_size=80),
    written=st.integers(0, 3000),
    max_tokens=st.integers(1, 3000),
    quantile=quantiles,
)
def test_what_is_left_is_within_max_tokens_and_grows_with_the_quantile(
    stopped: list[int], cut: list[int], written: int, max_tokens: int, quantile: float
) -> None:
    known = lengths(*stopped, cut=tuple(cut))
    rest = known.rest(written, max_tokens, quantile=quantile)
    assert 0 <= rest <= max(0, max_tokens - written)
    assert rest <= known.rest(written, max_tokens, quantile=(1 + quantile) / 2)
    if written < max_tokens and (stopped or cut or written):
        assert rest >= 1, "nothing is due now that has not ended"


# --- plans ------------------------------------------------------------------------------------------------------------


@given(
    ends=st.lists(st.integers(0, 30), max_size=6),
    services=st.lists(st.integers(1, 10), max_size=20),
    mean=st.integers(1, 10),
    k=st.integers(0, 40),
)
def test_a_plan_tells_what_a_simulation_of_the_slots_gives(
    ends: list[int], services: list[int], mean: int, k: int
) -> None:
    now = 100.0
    plan = Plan(now, [now + end for end in ends], services, guess_s=mean)
    slots = [now + end for end in ends] or [now + mean]
    heapq.heapify(slots)
    for task in range(k):  # the slot that comes free first takes the next task
        heapq.heapreplace(slots, slots[0] + (services[task] if task < len(services) else plan.mean_s))
    if k <= len(services):
        assert plan.start_at(k) == pytest.approx(slots[0])
    else:  # at the mean, each slot in turn
        assert abs(plan.start_at(k) - slots[0]) <= max([mean, *services, *ends])
        assert plan.mean_s == (sum(services) / len(services) if services else mean)


def test_a_plan_beyond_its_last_task_goes_on_at_the_mean() -> None:
    plan = Plan(0.0, [1.0, 2.0], [4.0], guess_s=10.0)  # the first slot takes the task from 1.0 to 5.0
    assert [plan.start_at(k) for k in range(4)] == [1.0, 2.0, 5.0, 6.0]
    assert plan.interval_s == 2.0


def running(forecast: Forecast, *, prompt: int = 1, max_tokens: int = 1000, since: float = 0.0) -> Running:
    return Running.of(make_task(max_tokens=max_tokens, prompt="x" * prompt), since)


def ended(
    forecast: Forecast, *, tokens: int, prompt_s: float = 0.0, token_s: float = 0.1, prompt: int = 1, full: bool = True
) -> None:
    """A task that took so long for its prompt and for each token came to its end."""
    one = running(forecast, prompt=prompt)
    one.task.first_token_at = prompt_s
    one.task.tokens_out = tokens
    forecast.observe(one, prompt_s + (tokens - 1) * token_s, full=full)


def end_of(forecast: Forecast, one: Running, now: float) -> float:
    """When its slot is expected to come free."""
    return forecast.plan(now, [one], 0, []).start_at(0)


def test_a_prompt_and_each_token_have_their_price() -> None:
    forecast = Forecast()
    ended(forecast, tokens=11, prompt=10, prompt_s=2.0, token_s=0.5)
    one = running(forecast, prompt=20)
    assert end_of(forecast, one, 0.0) == pytest.approx(2 * 2.0 + 10 * 0.5)


def test_a_running_task_is_judged_by_its_own_pace() -> None:
    forecast = Forecast()
    ended(forecast, tokens=100, token_s=0.1)
    slow = running(forecast)
    slow.task.first_token_at, slow.task.tokens_out = 0.0, 50
    assert end_of(forecast, slow, 50.0) - 50.0 == pytest.approx(50 * 1.0, rel=0.1)


def test_waiting_tasks_are_judged_by_the_pace_of_those_that_run() -> None:
    forecast = Forecast()
    ended(forecast, tokens=100, token_s=0.1)
    slow = [running(forecast) for _ in range(4)]
    for one in slow:
        one.task.first_token_at, one.task.tokens_out = 0.0, 100
    plan = forecast.plan(100.0, slow, 0, [make_task(max_tokens=1000) for _ in range(4)])
    assert plan.start_at(4) - plan.start_at(0) == pytest.approx(100 * 1.0, rel=0.1)


def test_waiting_tasks_are_judged_by_how_it_is_when_all_slots_are_taken() -> None:
    """The last tasks of a burst run alone and fast; the next burst does not."""
    forecast = Forecast()
    for _ in range(10):
        ended(forecast, tokens=100, token_s=0.4, full=True)
    for _ in range(10):
        ended(forecast, tokens=100, token_s=0.1, full=False)
    plan = forecast.plan(0.0, [], 1, [make_task(max_tokens=100), make_task(max_tokens=100)])
    assert plan.start_at(1) - plan.start_at(0) == pytest.approx(99 * 0.4, rel=0.1)


def write_growing(forecast: Forecast, tokens: int, *, looked_at: Sequence[int]) -> tuple[Running, float]:
    """A task whose token at position ``p`` takes 10 ms and a hundredth of a millisecond for each of ``p``."""
    one = running(forecast, max_tokens=3000)
    one.fixed = True
    one.task.first_token_at = 0.0
    now = 0.0
    for written in (*looked_at, tokens):
        one.task.tokens_out = written
        now = growing_s(written)
        forecast.plan(now, [one], 0, [])
    return one, now


def growing_s(tokens: int) -> float:
    return sum(0.01 + 0.00001 * position for position in range(2, tokens + 1))


def test_later_tokens_cost_more_where_they_did_before() -> None:
    forecast = Forecast()
    for tokens in (20, 1000, 20, 1000):
        one, now = write_growing(forecast, tokens, looked_at=())
        forecast.observe(one, now, full=True)
    one, now = write_growing(forecast, 500, looked_at=(100, 200, 300, 400))
    assert end_of(forecast, one, now) == pytest.approx(growing_s(3000), rel=0.1)


def test_later_tokens_cost_more_than_this_task_has_shown() -> None:
    """No task has ended yet, and the first one's own tokens tell."""
    forecast = Forecast()
    one, now = write_growing(forecast, 1500, looked_at=range(100, 1500, 100))
    assert end_of(forecast, one, now) == pytest.approx(growing_s(3000), rel=0.1)


def test_a_running_task_that_stands_still_is_not_about_to_end() -> None:
    forecast = Forecast()
    one, now = write_growing(forecast, 2990, looked_at=(1000, 2000))
    assert end_of(forecast, one, now) - now < 1.0
    assert 40 <= end_of(forecast, one, now + 100) - (now + 100) < 50  # its next token had its time, too
    assert 400 <= end_of(forecast, one, now + 1000) - (now + 1000) < 500


def test_a_prompt_that_takes_longer_than_expected_is_never_due_now() -> None:
    forecast = Forecast()
    ended(forecast, tokens=1, prompt_s=1.0)
    one = running(forecast)
    left = [end_of(forecast, one, now) - now for now in (0.0, 10.0, 100.0)]
    assert left == [pytest.approx(1.0), pytest.approx(5.0), pytest.approx(50.0)]


def test_of_eight_tasks_that_write_little_or_much_half_are_about_to_leave() -> None:
    forecast = Forecast()
    for tokens in [20, 1500] * 10:
        ended(forecast, tokens=tokens, token_s=0.1)
    plan = forecast.plan(0.0, [running(forecast, max_tokens=2000) for _ in range(8)], 0, [])
    ends = [plan.start_at(k) for k in range(8)]
    assert sum(end < 5 for end in ends) == 4
    assert sum(end > 100 for end in ends) == 4


def test_a_task_that_only_max_tokens_can_end_takes_all_of_them() -> None:
    forecast = Forecast()
    for _ in range(20):
        ended(forecast, tokens=20, token_s=0.1)
    fixed = Running.of(make_task(max_tokens=500, ignore_eos=True), 0.0)
    assert end_of(forecast, fixed, 0.0) == pytest.approx(499 * 0.1)


def test_a_long_queue_is_planned_by_its_head() -> None:
    forecast = Forecast()
    ended(forecast, tokens=11, token_s=0.1)
    waiting = [make_task(max_tokens=1000) for _ in range(10 * MAX_PLANNED)]
    plan = forecast.plan(0.0, [], 1, waiting)
    assert plan.planned == MAX_PLANNED
    assert plan.start_at(len(waiting)) == pytest.approx(len(waiting) * 1.0)


def test_tokens_that_took_no_time_say_nothing() -> None:
    """A clock may stand still, and the worker's look at it may be later than the scheduler's."""
    forecast = Forecast()
    for token_s in (0.0, -0.1):
        ended(forecast, tokens=100, token_s=token_s)
    ended(forecast, tokens=100, token_s=0.1)
    plan = forecast.plan(0.0, [], 1, [make_task(max_tokens=100), make_task(max_tokens=100)])
    assert plan.start_at(1) == pytest.approx(99 * 0.1)


def test_tasks_that_were_cut_off_say_nothing_of_how_long_others_write() -> None:
    """To the very token: what stopped by itself with its last one was cut off, too."""
    forecast = Forecast()
    for _ in range(20):
        one = running(forecast, max_tokens=100)
        one.task.first_token_at, one.task.tokens_out = 0.0, 100
        forecast.observe(one, 9.9, full=True)
    assert forecast.lengths.rest(0, 1000, quantile=0.5) == 1000
    ended(forecast, tokens=20)
    assert forecast.lengths.rest(0, 1000, quantile=0.01) == 20


def test_the_last_tokens_of_a_task_are_measured_however_few_they_are() -> None:
    forecast = Forecast()
    ended(forecast, tokens=3, token_s=0.5)
    plan = forecast.plan(0.0, [], 1, [])
    assert plan.token_s == pytest.approx(0.5)


def test_the_first_tokens_of_one_that_goes_on_are_not() -> None:
    """What three tokens took says little, and may be the noise of a step."""
    forecast = Forecast()
    before = forecast.plan(0.0, [], 1, []).token_s
    one = running(forecast)
    one.task.first_token_at, one.task.tokens_out = 0.0, 3
    assert forecast.plan(0.1, [one], 0, []).token_s == before


def test_a_plan_tells_what_a_token_takes_now() -> None:
    forecast = Forecast()
    for _ in range(20):
        ended(forecast, tokens=100, token_s=0.1)
    for _ in range(20):
        ended(forecast, tokens=100, token_s=0.3)
    assert forecast.plan(0.0, [], 1, []).token_s == pytest.approx(0.3, rel=0.05)


def test_while_none_waits_a_task_is_guessed_to_be_like_half_of_the_others() -> None:
    forecast = Forecast()
    for tokens in (10, 20, 30, 40, 50):
        for _ in range(4):
            ended(forecast, tokens=tokens, token_s=0.1)
    assert forecast.plan(0.0, [], 1, []).mean_s == pytest.approx(29 * 0.1, rel=0.05)


def test_a_task_that_is_added_to_a_plan_is_one_of_the_likely_ones() -> None:
    forecast = Forecast()
    for tokens in [20, 900] * 10:
        ended(forecast, tokens=tokens, token_s=0.1)
    plan = forecast.plan(0.0, [], 1, [])
    for _ in range(8):
        forecast.add_to(plan, make_task(max_tokens=2000))
    services = [plan.start_at(k + 1) - plan.start_at(k) for k in range(7)]
    assert {round(service_s / 10) for service_s in services} == {0, 9}
    assert 2 <= sum(service_s > 50 for service_s in services) <= 5


def test_a_waiting_task_that_only_max_tokens_can_end_is_planned_with_all_of_them() -> None:
    forecast = Forecast()
    for _ in range(20):
        ended(forecast, tokens=20, token_s=0.1)
    plan = forecast.plan(0.0, [], 1, [make_task(max_tokens=500, ignore_eos=True), make_task(max_tokens=500)])
    assert plan.start_at(1) == pytest.approx(499 * 0.1)
