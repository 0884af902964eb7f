"""Predictions and promises: right by brute force, and honest under overload in simulated time."""

from __future__ import annotations

import heapq

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchd.drain import FIRST_GUESS_S, MAX_PROMISES, DrainRate, Promises, Schedule
from orchd.errors import AdmissionReject
from orchd.scheduler import Scheduler
from orchd.seat import Seat
from orchd.tasks import Task
from tests.core.builders import Clock, make_task
from tests.core.simulation import Simulation, nothing

# --- schedules --------------------------------------------------------------------------------------------------------


@given(
    ages=st.lists(st.integers(0, 30), max_size=6),
    free_slots=st.integers(0, 3),
    service=st.integers(1, 10),
    k=st.integers(0, 40),
)
def test_a_schedule_tells_what_a_simulation_of_the_slots_gives(
    ages: list[int], free_slots: int, service: int, k: int
) -> None:
    now = 100.0
    rate = DrainRate()
    rate.observe(service)
    schedule = rate.schedule(now, [now - age for age in ages], free_slots)
    slots = [now] * free_slots + [max(now - age + service, now) for age in ages]
    if not slots:
        assert schedule.free_at(k) == now + (k + 1) * service
        return
    heapq.heapify(slots)
    for _ in range(k):  # the slot that comes free first takes the next task
        heapq.heapreplace(slots, slots[0] + service)
    assert schedule.free_at(k) == pytest.approx(slots[0])


def test_there_is_a_sane_guess_before_the_first_measurement() -> None:
    assert DrainRate().schedule(0, [0], 0).free_at(0) == FIRST_GUESS_S


def test_the_first_measurement_replaces_the_guess_and_later_ones_are_smoothed() -> None:
    rate = DrainRate()
    rate.observe(10.0)
    assert rate.service_s == 10.0
    rate.observe(20.0)
    assert 10.0 < rate.service_s < 12.0
    for _ in range(100):
        rate.observe(20.0)
    assert rate.service_s == pytest.approx(20.0, rel=0.01)


# --- promises ---------------------------------------------------------------------------------------------------------


def _full(now: float, *ends: float) -> Schedule:
    return Schedule(now, sorted(ends), service_s=1.0)


def test_the_second_sender_is_promised_the_second_place() -> None:
    promises = Promises()
    schedule = _full(0.0, 0.5, 1.2)
    assert promises.make(schedule, 0) == pytest.approx(0.5, rel=0.1)
    assert promises.make(schedule, 0) == pytest.approx(1.2, rel=0.1)


def test_promises_stay_apart_when_the_pool_has_become_faster() -> None:
    promises = Promises()
    for _ in range(3):
        last_s = promises.make(_full(0.0, 5.0), 0)
    quick = Schedule(0.0, [0.1], service_s=0.1)
    assert promises.make(quick, 0) == pytest.approx(last_s + 0.1)
    assert promises.make(quick, 0) == pytest.approx(last_s + 0.2)


def test_who_comes_at_the_promised_time_gets_the_place() -> None:
    promises = Promises()
    pause_s = promises.make(_full(0.0, 0.5), 0)
    assert promises.admits(_full(pause_s, 1.5), 1)
    promises.redeem(pause_s)
    assert not promises


def test_a_newcomer_does_not_get_the_place_that_was_promised() -> None:
    promises = Promises()
    promises.make(_full(0.0, 0.5, 9.0), 0)
    assert not promises.admits(_full(0.505, 1.6, 9.0), 1)


def test_a_place_that_no_promise_depends_on_is_free_to_anyone_at_once() -> None:
    promises = Promises()
    promises.make(_full(0.0, 0.5, 9.0), 0)
    assert promises.admits(_full(0.1, 0.5, 9.0), 1)  # say, of a cancelled task: the promised slot is still to come
    assert promises.admits(_full(0.505, 1.6, 9.0), 2)  # the promised place, and another


def test_a_promise_whose_sender_never_comes_expires() -> None:
    promises = Promises()
    promises.make(_full(0.0, 0.5), 0)
    assert promises.admits(_full(5.0, 5.5), 1)
    promises.redeem(5.0)
    assert not promises


def test_who_finds_no_place_at_the_promised_time_holds_one_promise_not_two() -> None:
    promises = Promises()
    pause_s = promises.make(_full(0.0, 0.5), 0)
    assert promises.make(_full(pause_s, 0.8), 0) > 0
    assert len(promises) == 1


def test_senders_that_ignore_their_pause_cannot_pile_up_promises() -> None:
    promises = Promises()
    pauses = [promises.make(_full(0.0, 0.001), 0) for _ in range(MAX_PROMISES + 100)]
    assert len(promises) == MAX_PROMISES
    assert pauses == sorted(pauses)


# --- through the scheduler --------------------------------------------------------------------------------------------


def _overloaded(clock: Clock) -> tuple[Scheduler, list[Task]]:
    """One slot with a task that is to end in a second, a full queue of two, and one sender that was sent away."""
    scheduler = Scheduler(2, [Seat(0, 1, ready=True)], clock=clock)
    seat = scheduler.seats[0]
    scheduler.reserve()
    scheduler.submit(first := make_task())
    scheduler.next_for(seat)
    clock.now += 1
    scheduler.release(seat, first, completed=True)  # service time: 1 s
    tasks = [make_task() for _ in range(3)]
    for task in tasks:
        scheduler.reserve()
        scheduler.submit(task)
        scheduler.next_for(seat)
    with pytest.raises(AdmissionReject):
        scheduler.reserve()
    return scheduler, tasks


def test_a_cancelled_tasks_place_goes_to_a_newcomer_at_once() -> None:
    scheduler, tasks = _overloaded(Clock())
    scheduler.cancel(tasks[1])
    scheduler.reserve()


def test_a_promised_place_that_comes_free_is_kept_for_the_one_who_was_promised_it() -> None:
    scheduler, tasks = _overloaded(clock := Clock())
    clock.now += 1.0
    scheduler.release(scheduler.seats[0], tasks[0], completed=True)
    assert scheduler.next_for(scheduler.seats[0]) is not None
    with pytest.raises(AdmissionReject):
        scheduler.reserve()
    clock.now += 0.06
    scheduler.reserve()  # who waited


def test_nobody_is_sent_away_beside_an_idle_slot_whatever_was_promised() -> None:
    scheduler, tasks = _overloaded(Clock())
    for task in tasks[1:]:
        scheduler.cancel(task)
    scheduler.release(scheduler.seats[0], tasks[0], completed=False)
    scheduler.reserve()


# --- honesty under overload -------------------------------------------------------------------------------------------

SHAPES = [([4], 16), ([1], 8), ([2, 4], 16), ([4], 64), ([2, 2, 2], 64)]


@pytest.mark.parametrize("spread", [0.0, 0.1])
@pytest.mark.parametrize("crowd", [1.2, 3.0])
@pytest.mark.parametrize(("slots", "capacity"), SHAPES)
def test_a_client_that_waits_the_pause_is_admitted_in_a_closed_loop(
    slots: list[int], capacity: int, crowd: float, spread: float
) -> None:
    simulation = Simulation(slots=slots, capacity=capacity, spread=spread)
    simulation.closed_loop(int(crowd * (capacity + sum(slots))) + 1)
    simulation.run(300)
    assert simulation.kept >= 0.8
    assert simulation.utilisation > 0.999
    assert simulation.prediction_error < 0.3


@pytest.mark.parametrize("spread", [0.0, 0.1])
@pytest.mark.parametrize("retries", [1, None])
@pytest.mark.parametrize(("slots", "capacity"), SHAPES)
def test_a_client_that_waits_the_pause_is_admitted_under_poisson_arrivals(
    slots: list[int], capacity: int, retries: int | None, spread: float
) -> None:
    simulation = Simulation(slots=slots, capacity=capacity, spread=spread)
    simulation.open_loop(1.5, retries=retries)
    simulation.run(200)
    assert simulation.kept >= 0.8
    assert simulation.utilisation > 0.99
    assert simulation.prediction_error < 0.3


def test_clients_that_never_come_back_cost_no_throughput() -> None:
    simulation = Simulation(slots=[4], capacity=16, spread=0.1)
    simulation.open_loop(2.0, retries=0)
    simulation.run(200)
    assert simulation.utilisation > 0.99


def test_a_client_that_knocks_all_the_time_costs_no_throughput() -> None:
    simulation = Simulation(slots=[4], capacity=16, spread=0.1)
    simulation.closed_loop(25)

    def hammer() -> None:
        simulation.knock(nothing, retries=0)
        simulation.after(0.02, hammer)

    simulation.after(0, hammer)
    simulation.run(200)
    assert simulation.utilisation > 0.99
