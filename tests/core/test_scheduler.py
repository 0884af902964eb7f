"""The queue, one behaviour each: order, bound, placement, back-off, predictions."""

from __future__ import annotations

import array

import pytest
from hypothesis import strategies as st

from orchd.errors import AdmissionReject
from orchd.scheduler import Place, Scheduler
from orchd.schemas import Priority
from orchd.tasks import Task
from tests.core.builders import Clock, make_task
from tests.core.queueing import make_scheduler, submit, take, take_all

INTERACTIVE, BATCH = Priority.INTERACTIVE, Priority.BATCH
priorities = st.sampled_from(Priority)


def test_interactive_tasks_start_before_waiting_batch_tasks_in_order_of_arrival() -> None:
    scheduler = make_scheduler(1)
    seat = scheduler.seats[0]
    submit(scheduler, first := make_task())
    assert take(scheduler, seat) is first
    tasks = [make_task(priority) for priority in (BATCH, INTERACTIVE, BATCH, INTERACTIVE)]
    submit(scheduler, *tasks)
    order = []
    running: Task | None = first
    while running is not None:
        scheduler.release(seat, running, completed=True)
        running = take(scheduler, seat)
        order.append(running)
    assert order == [tasks[1], tasks[3], tasks[0], tasks[2], None]


def test_an_interactive_task_takes_the_slot_a_batch_task_was_placed_on_but_not_started() -> None:
    scheduler = make_scheduler(1)
    submit(scheduler, batch := make_task(BATCH), interactive := make_task())
    assert take_all(scheduler) == [interactive]
    assert scheduler.cancel(batch) is Place.WAITING


def test_the_last_place_is_given_once() -> None:
    scheduler = make_scheduler(1, capacity=1)
    submit(scheduler, make_task())
    scheduler.reserve()  # the only waiting place, its prompt still being tokenised
    with pytest.raises(AdmissionReject):
        scheduler.reserve()
    scheduler.release_place()
    scheduler.reserve()


def test_a_full_queue_takes_no_one_and_drops_no_one() -> None:
    scheduler = make_scheduler(2, capacity=3)
    tasks = [make_task(BATCH) for _ in range(5)]
    submit(scheduler, *tasks)
    with pytest.raises(AdmissionReject, match=r"the queue is full \(3 tasks waiting\)") as refusal:
        scheduler.reserve()
    assert refusal.value.retry_after_s is not None
    assert take_all(scheduler) == tasks[:2]
    assert scheduler.waiting() == tasks[2:]


@pytest.mark.parametrize(
    ("capacity", "pauses"),
    [(8, [0, 0, 0, 0, 2000, 4000, 6000, 8000, 10_000]), (2, [0, 2000, 4000]), (1, [0, 2000])],
)
def test_backoff_is_zero_while_the_queue_is_under_half_full_and_grows_from_there(
    capacity: int, pauses: list[int]
) -> None:
    scheduler = make_scheduler(1, capacity=capacity)
    submit(scheduler, *(tasks := [make_task() for _ in pauses]))
    assert [task.accepted.backoff_ms for task in tasks if task.accepted is not None] == pauses


def test_tasks_placed_on_a_replica_that_goes_are_placed_on_another() -> None:
    scheduler = make_scheduler(2, 2)
    submit(scheduler, *(tasks := [make_task() for _ in range(2)]))
    assert [seat.claims for seat in scheduler.seats] == [1, 1]
    scheduler.set_ready(scheduler.seats[0], ready=False)
    assert [seat.claims for seat in scheduler.seats] == [0, 2]
    assert take_all(scheduler) == tasks


def test_a_stalled_replica_gets_nothing_until_it_moves_again() -> None:
    scheduler = make_scheduler(2, 1)
    submit(scheduler, first := make_task())
    assert scheduler.seats[0].claims == 1
    scheduler.note_stall(scheduler.seats[0])
    assert take(scheduler, scheduler.seats[1]) is first
    submit(scheduler, second := make_task())
    assert scheduler.seats[0].claims == 0
    assert scheduler.any_ready
    scheduler.note_stall(scheduler.seats[1])
    assert not scheduler.any_ready
    assert take(scheduler, scheduler.seats[0]) is second  # it moved
    assert scheduler.any_ready


def test_a_replica_that_comes_takes_what_waits() -> None:
    scheduler = make_scheduler(1)
    scheduler.set_ready(scheduler.seats[0], ready=False)
    submit(scheduler, waiting := make_task())
    assert not scheduler.any_ready
    scheduler.set_ready(scheduler.seats[0], ready=True)
    assert scheduler.any_ready
    assert scheduler.seats[0].claims == 1
    assert take(scheduler, scheduler.seats[0]) is waiting


def test_a_switch_changes_every_host_at_once_and_the_prompts_of_those_that_wait() -> None:
    scheduler = make_scheduler(1, 2, 1)
    submit(scheduler, started := make_task(prompt="a"))
    taken = take_all(scheduler)
    submit(scheduler, *(waiting := [make_task(prompt="a") for _ in range(4)]))
    new = array.array("i", [7])
    scheduler.switch(["new 0", None, "new 2"], {task.id: new for task in [started, waiting[0], waiting[2]]})
    assert taken == [started]
    assert [task.tokens is new for task in [started, *waiting]] == [False, True, False, True, False]
    assert [(seat.host, seat.ready) for seat in scheduler.seats] == [("new 0", True), (None, False), ("new 2", True)]
    assert [seat.claims for seat in scheduler.seats] == [1, 0, 1]
    scheduler.check_integrity()
    found = [scheduler.next_for(seat) for seat in scheduler.seats]
    assert found == [(waiting[0], "new 0"), None, (waiting[1], "new 2")]


def test_a_switch_leaves_no_replica_out() -> None:
    scheduler = make_scheduler(1, 1)
    with pytest.raises(ValueError, match="shorter"):
        scheduler.switch(["new"], {})


def test_a_replica_that_is_brought_back_takes_what_waits_on_its_new_host() -> None:
    scheduler = make_scheduler(2)
    seat = scheduler.seats[0]
    scheduler.switch([None], {})
    submit(scheduler, *(tasks := [make_task() for _ in range(3)]))
    assert take(scheduler, seat) is None
    scheduler.bring_back(seat, "again")
    assert seat.claims == 2
    assert scheduler.next_for(seat) == (tasks[0], "again")


def test_free_memory_counts_from_the_next_placement_on() -> None:
    scheduler = make_scheduler(2, 2)
    scheduler.note_free_bytes(scheduler.seats[1], 2**30)
    submit(scheduler, make_task())
    assert [seat.claims for seat in scheduler.seats] == [0, 1]


def test_cancelling_a_placed_task_gives_its_slot_to_the_next() -> None:
    scheduler = make_scheduler(1, 1)
    first, second, third = (make_task() for _ in range(3))
    submit(scheduler, first, second)
    scheduler.cancel(first)
    submit(scheduler, third)
    assert take_all(scheduler) == [second, third]


def test_tasks_that_left_without_a_replica_are_counted_by_priority() -> None:
    scheduler = make_scheduler(1)
    submit(scheduler, first := make_task(), *(make_task(BATCH) for _ in range(3)))
    assert scheduler.cancel(first) is Place.WAITING
    assert len(scheduler.drain_waiting()) == 3
    assert scheduler.dropped == {INTERACTIVE: 1, BATCH: 3}
    assert scheduler.seats[0].claims == 0


def prediction(scheduler: Scheduler) -> tuple[int, int]:
    """Place in the queue and milliseconds to the start that the next task is told."""
    scheduler.reserve()
    answer, _ = scheduler.submit(task := make_task())
    assert answer.task_id == task.id
    return answer.queue_position, answer.predicted_start_ms


def test_a_start_is_predicted_from_how_long_tasks_took_and_when_those_that_run_began() -> None:
    scheduler = make_scheduler(1, 1, clock=(clock := Clock()))
    submit(scheduler, first := make_task())
    take_all(scheduler)
    clock.now += 4
    scheduler.release(scheduler.seats[0], first, completed=True)
    assert prediction(scheduler) == (0, 0)
    take_all(scheduler)
    clock.now += 1
    assert prediction(scheduler) == (0, 0)  # the other replica is idle
    take_all(scheduler)
    assert [prediction(scheduler) for _ in range(4)] == [(0, 3000), (1, 4000), (2, 7000), (3, 8000)]


def test_a_slot_of_any_replica_is_a_start_at_once() -> None:
    for idle in range(3):
        scheduler = make_scheduler(1, 1, 1)
        submit(scheduler, *(make_task() for _ in range(3)))
        running = {seat.index: task for seat in scheduler.seats if (task := take(scheduler, seat)) is not None}
        scheduler.release(scheduler.seats[idle], running[idle], completed=False)
        assert prediction(scheduler) == (0, 0)


def test_a_replica_that_hangs_is_not_counted_on() -> None:
    scheduler = make_scheduler(1, 1, clock=(clock := Clock()))
    submit(scheduler, make_task())
    take_all(scheduler)
    clock.now += 1
    submit(scheduler, make_task())
    take_all(scheduler)
    scheduler.note_stall(scheduler.seats[0])
    assert prediction(scheduler) == (0, 2000)


def test_nobody_is_made_to_wait_for_a_promise_while_nobody_waits() -> None:
    scheduler = make_scheduler(1, capacity=1, clock=(clock := Clock()))
    submit(scheduler, running := make_task())
    take_all(scheduler)
    submit(scheduler, waiting := make_task())
    with pytest.raises(AdmissionReject):
        scheduler.reserve()
    clock.now += 1
    scheduler.release(scheduler.seats[0], running, completed=False)
    assert take_all(scheduler) == [waiting]
    scheduler.reserve()


def test_a_pool_without_a_ready_replica_still_bounds_and_predicts() -> None:
    scheduler = make_scheduler(1, capacity=2)
    scheduler.set_ready(scheduler.seats[0], ready=False)
    submit(scheduler, make_task(), last := make_task())
    assert last.accepted is not None
    assert last.accepted.predicted_start_ms > 0
    with pytest.raises(AdmissionReject):
        scheduler.reserve()
