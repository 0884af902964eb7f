"""What refused senders are told: alone, in a crowd, and by a server in simulated time in every mix of lengths."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import pytest

from orchd.queue.backoff import Backoff
from orchd.queue.forecast import Plan
from tests.queue.simulation import Job, Jobs, Simulation, nothing

# --- one sender after the other ---------------------------------------------------------------------------------------


def plan(now: float = 0.0, *, first_s: float = 1.0, service_s: float = 1.0, waiting: int = 64) -> Plan:
    """One slot that comes free after so long, and tasks that wait for it."""
    return Plan(now, [now + first_s], [service_s] * waiting, guess_s=service_s)


def test_a_pause_ends_soon_after_the_place_is_expected() -> None:
    assert 1.0 <= Backoff(100).pause_s(plan(), 0) <= 3.0
    assert 5.0 <= Backoff(100).pause_s(plan(), 4) <= 8.0


def test_senders_that_are_told_the_same_are_told_it_apart() -> None:
    backoff = Backoff(100)
    told = sorted(backoff.pause_s(plan(), 0) for _ in range(20))
    assert told[-1] - told[0] < 1.0
    assert min(later - earlier for earlier, later in pairwise(told)) > 0.01


def test_once_senders_come_back_each_is_told_a_place_of_its_own() -> None:
    backoff = Backoff(100)
    due = sorted(backoff.pause_s(plan(), 0) for _ in range(30))
    for when in due:
        backoff.note_sender(when)
    assert backoff.returning > 0.9
    told = [backoff.pause_s(plan(), 0) for _ in range(10)]
    assert told == sorted(told)
    assert told[-1] > 9.0


def test_once_senders_stay_away_nobody_waits_for_them() -> None:
    backoff = Backoff(100)
    now = 0.0
    for comes in [True] * 30 + [False] * 30:
        now += backoff.pause_s(plan(now), 0)
        if comes:
            backoff.note_sender(now)
        else:
            now += 10
    backoff.note_sender(now)
    assert backoff.returning < 0.1


def test_a_pause_reaches_no_further_than_all_places() -> None:
    backoff = Backoff(8)
    backoff.returning = 1.0
    assert max(backoff.pause_s(plan(), 0) for _ in range(5000)) < 9 * 1.25 + 1.5


def test_a_sender_is_known_by_its_tasks_id_whenever_it_comes() -> None:
    backoff = Backoff(100)
    backoff.pause_s(plan(), 0, "a")
    backoff.note_sender(0.5, "b")
    assert backoff.returning == 0
    backoff.note_sender(0.6, "a")
    assert backoff.returning > 0
    known = backoff.returning
    backoff.pause_s(plan(0.6), 0, "a")  # refused again
    backoff.note_sender(4.0, "b")
    assert backoff.returning == known, "the first time it was told is over, not the second"
    backoff.note_sender(100.0, "b")
    assert backoff.returning < known


@pytest.mark.parametrize("task_id", [None, "a"])
def test_who_knocks_without_end_takes_no_memory_without_end(task_id: str | None) -> None:
    backoff = Backoff(100)
    for knock in range(10_000):
        backoff.note_sender(knock / 1000, task_id)
        backoff.pause_s(plan(knock / 1000, first_s=3600), 0, task_id)
    assert len(backoff._order) + len(backoff._nameless) <= 4096
    backoff.note_sender(10_000)
    assert not backoff._order
    assert not backoff._nameless


def test_who_comes_early_is_not_taken_for_one_that_was_told_to() -> None:
    backoff = Backoff(100)
    pause_s = backoff.pause_s(plan(), 0)
    backoff.note_sender(pause_s - 0.1)
    assert backoff.returning == 0
    backoff.note_sender(pause_s)
    assert backoff.returning > 0


# --- clients that obey, in simulated time -----------------------------------------------------------------------------

CAPACITY = 16


def _about(tokens: int, *, max_tokens: int | None = None) -> Jobs:
    return _either(*range(tokens * 9 // 10, tokens * 11 // 10 + 1), max_tokens=max_tokens)


def _either(*tokens: int, max_tokens: int | None = None) -> Jobs:
    def job(choose: random.Random, share: float) -> Job:
        n = choose.choice(tokens)
        return Job(n, max_tokens or n)

    return job


def _growing(*, max_tokens: int | None = None) -> Jobs:
    def job(choose: random.Random, share: float) -> Job:
        n = choose.randint(45, 55) * (1 if share < 0.5 else 10)
        return Job(n, max_tokens or n)

    return job


MIXES: dict[str, tuple[Jobs, int]] = {
    "all short": (_about(20), 20),
    "all long": (_about(1500), 1500),
    "short or long, as max_tokens says": (_either(20, 1500), 760),
    "short or long, and nobody knows": (_either(20, 1500, max_tokens=2000), 760),
    "ten times longer in the middle, as max_tokens says": (_growing(), 500),
    "ten times longer in the middle, and nobody knows": (_growing(max_tokens=4000), 500),
    "max_tokens far above what is used": (_about(100, max_tokens=4000), 100),
}
"""Each with the tokens for which the load is made; of lengths that grow, the longer ones."""


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("slots", [[1], [8], [2, 4]], ids=str)
@pytest.mark.parametrize("nameless", [False, True], ids=["with ids", "without"])
def test_a_client_that_waits_as_told_is_admitted_whatever_lengths_there_are(
    mix: str, slots: list[int], nameless: bool
) -> None:
    jobs, tokens = MIXES[mix]
    task_s = (0.05 + 0.01 * tokens) / sum(slots)
    size = (CAPACITY + sum(slots)) * 3 // 2
    duration_s = 60 * size * task_s / 0.7
    simulation = Simulation(slots=slots, capacity=CAPACITY, jobs=jobs, duration_s=duration_s, nameless=nameless)
    simulation.bursts(size, within_s=task_s, every_s=size * task_s / 0.7)
    simulation.run()
    assert simulation.kept >= 0.8
    assert simulation.refused_per_admitted <= 1.5
    assert simulation.prediction_error <= 0.3
    assert simulation.idle <= 0.02


@pytest.mark.parametrize("load", [0.95, 1.5, 3.0])
@pytest.mark.parametrize("retries", [0, 3])
def test_whoever_comes_and_whoever_stays_away_no_slot_is_idle_while_somebody_waits_to_come_back(
    load: float, retries: int
) -> None:
    simulation = Simulation(slots=[4], capacity=CAPACITY, jobs=_about(100), duration_s=600)
    simulation.poisson(load * 4 / 1.05, retries=retries)
    simulation.run()
    assert simulation.idle < 0.001
    assert simulation.prediction_error <= 0.3


@pytest.mark.parametrize(("nameless", "places"), [(False, 2), (True, 10)])
def test_senders_that_never_return_cost_nobody_a_longer_pause(nameless: bool, places: int) -> None:
    """Where a task takes about 1.05 s, and twenty such senders come each second."""
    simulation = Simulation(slots=[1], capacity=8, jobs=_about(100), duration_s=600, nameless=nameless)
    simulation.poisson(20, retries=0)
    simulation.run()
    assert max(simulation.pauses) < (1.25 * places + 1.5) * 1.05 * 1.1


def test_a_client_that_knocks_all_the_time_costs_no_throughput() -> None:
    simulation = Simulation(slots=[4], capacity=CAPACITY, jobs=_about(100), duration_s=200)
    simulation.closed_loop(25, think_s=0.01)
    every(simulation, 0.02, lambda: simulation.send(nothing, retries=0))
    simulation.run()
    assert simulation.idle < 0.001
    assert simulation.ended > 0.98 * 190 * 4 / 1.05


def every(simulation: Simulation, seconds: float, call: Callable[[], None]) -> None:
    def again() -> None:
        call()
        simulation.after(seconds, again)

    simulation.after(0, again)
