"""The queue, one behaviour each: order, bound, placement, predictions."""

from __future__ import annotations

import pytest

from engines.api import Prompt
from orchd.errors import AdmissionReject
from orchd.models.prepared import Prepared
from orchd.queue.scheduler import Found, Scheduler
from orchd.queue.tasks import Task
from orchd.schemas import Priority
from testkit.builders import Clock, make_task
from tests.queue.queueing import AWAKE, make_scheduler, refused, serve, submit, take, take_all

INTERACTIVE, BATCH = Priority.INTERACTIVE, Priority.BATCH


def test_interactive_tasks_start_before_waiting_batch_tasks_in_order_of_arrival() -> None:
    scheduler = make_scheduler(1)
    slots = scheduler.replicas[0]
    submit(scheduler, first := make_task())
    assert take(scheduler, slots) is first
    tasks = [make_task(priority) for priority in (BATCH, INTERACTIVE, BATCH, INTERACTIVE)]
    submit(scheduler, *tasks)
    order = []
    running: Task | None = first
    while running is not None:
        scheduler.release(slots, running, completed=True)
        running = take(scheduler, slots)
        order.append(running)
    assert order == [tasks[1], tasks[3], tasks[0], tasks[2], None]


def test_an_interactive_task_takes_the_slot_a_batch_task_was_placed_on_but_not_started() -> None:
    scheduler = make_scheduler(1)
    submit(scheduler, batch := make_task(BATCH), interactive := make_task())
    assert take_all(scheduler) == [interactive]
    assert scheduler.cancel(batch) is Found.WAITING


def test_the_last_place_is_given_once() -> None:
    scheduler = make_scheduler(1, capacity=1)
    submit(scheduler, make_task())
    with scheduler.reservation(INTERACTIVE):  # the only place, for a prompt that is still being tokenised
        assert refused(scheduler)
    assert refused(scheduler) is None


def test_a_place_is_given_back_whatever_happens_to_its_sender() -> None:
    scheduler = make_scheduler(1, capacity=1)
    submit(scheduler, make_task())
    with pytest.raises(KeyError), scheduler.reservation(INTERACTIVE):
        raise KeyError
    assert refused(scheduler) is None


def test_a_full_queue_takes_no_one_and_drops_no_one() -> None:
    scheduler = make_scheduler(2, capacity=3)
    tasks = [make_task(BATCH) for _ in range(5)]
    submit(scheduler, *tasks)
    with pytest.raises(AdmissionReject, match=r"the queue is full \(3 tasks\); try again in \d+\.\d s") as refusal:
        submit(scheduler, make_task())
    assert refusal.value.retry_after_s is not None
    assert take_all(scheduler) == tasks[:2]
    assert scheduler.waiting() == tasks[2:]


def test_nobody_is_refused_below_the_bound_whatever_others_were_told() -> None:
    scheduler = make_scheduler(1, capacity=8)
    submit(scheduler, *(tasks := [make_task() for _ in range(9)]))
    take_all(scheduler)
    assert all(refused(scheduler) for _ in range(40))
    scheduler.cancel(tasks[1])
    submit(scheduler, make_task())
    assert refused(scheduler)


@pytest.mark.parametrize(
    ("capacity", "places"),
    [(8, [0, 0, 0, 0, 1, 2, 3, 4, 5]), (2, [0, 1, 2]), (1, [0, 1])],
)
def test_backoff_is_zero_while_the_queue_is_under_half_full_and_grows_from_there(
    capacity: int, places: list[int]
) -> None:
    scheduler = make_scheduler(1, capacity=capacity, clock=(clock := Clock()))
    serve(scheduler, clock, seconds=2)
    submit(scheduler, *(tasks := [make_task() for _ in places]))
    pauses = [task.accepted.backoff_ms for task in tasks if task.accepted is not None]
    assert pauses == [pytest.approx(2000 * place, rel=0.01) for place in places]


def test_tasks_for_a_replica_that_goes_start_on_another() -> None:
    scheduler = make_scheduler(2, 2)
    submit(scheduler, *(tasks := [make_task() for _ in range(2)]))
    scheduler.set_ready(scheduler.replicas[0], ready=False)
    assert take_all(scheduler) == tasks
    assert [slots.busy for slots in scheduler.replicas] == [0, 2]


def test_only_the_least_loaded_replica_gets_a_task_and_one_that_asks_too_early_wakes_it() -> None:
    scheduler = make_scheduler(1, 2)
    awake = AWAKE[scheduler]
    submit(scheduler, task := make_task())
    assert awake == {1}
    awake.clear()  # it has not come yet
    assert take(scheduler, scheduler.replicas[0]) is None
    assert awake == {1}
    assert take(scheduler, scheduler.replicas[1]) is task


def test_a_stalled_replica_gets_nothing_until_it_moves_again() -> None:
    scheduler = make_scheduler(2, 1)
    submit(scheduler, first := make_task())
    assert AWAKE[scheduler] == {0}
    scheduler.note_stall(scheduler.replicas[0])
    assert AWAKE[scheduler] == {0, 1}
    assert take(scheduler, scheduler.replicas[1]) is first
    submit(scheduler, second := make_task())
    assert scheduler.any_ready
    scheduler.note_stall(scheduler.replicas[1])
    assert not scheduler.any_ready
    assert take(scheduler, scheduler.replicas[0]) is second  # it moved
    assert scheduler.any_ready


def test_a_replica_that_comes_takes_what_waits() -> None:
    scheduler = make_scheduler(1)
    scheduler.set_ready(scheduler.replicas[0], ready=False)
    submit(scheduler, waiting := make_task())
    assert not scheduler.any_ready
    scheduler.set_ready(scheduler.replicas[0], ready=True)
    assert scheduler.any_ready
    assert take_all(scheduler) == [waiting]


def test_a_switch_changes_every_instance_at_once_and_the_prompts_of_those_that_wait() -> None:
    scheduler = make_scheduler(1, 2, 1)
    submit(scheduler, started := make_task(prompt="a"))
    taken = take_all(scheduler)
    submit(scheduler, *(waiting := [make_task(prompt="a") for _ in range(4)]))
    new = Prompt([7])
    prompts = {task.id: Prepared(new, None) for task in [started, waiting[0], waiting[2]]}
    scheduler.switch(["new 0", None, "new 2"], prompts)
    assert taken == [started]
    assert [task.prompt is new for task in [started, *waiting]] == [False, True, False, True, False]
    assert [(slots.instance, slots.ready) for slots in scheduler.replicas] == [
        ("new 0", True),
        (None, False),
        ("new 2", True),
    ]
    scheduler.check_integrity()
    found = [scheduler.next_for(slots) for slots in scheduler.replicas]
    assert found == [(waiting[0], "new 0"), None, (waiting[1], "new 2")]


def test_a_switch_leaves_no_replica_out() -> None:
    scheduler = make_scheduler(1, 1)
    with pytest.raises(ValueError, match="shorter"):
        scheduler.switch(["new"], {})


def test_a_replica_that_is_brought_back_takes_what_waits_on_its_new_instance() -> None:
    scheduler = make_scheduler(2)
    slots = scheduler.replicas[0]
    scheduler.switch([None], {})
    submit(scheduler, *(tasks := [make_task() for _ in range(3)]))
    assert take(scheduler, slots) is None
    AWAKE[scheduler].clear()
    scheduler.bring_back(slots, "again")
    assert AWAKE[scheduler] == {0}
    assert scheduler.next_for(slots) == (tasks[0], "again")


def test_free_memory_counts_from_the_next_placement_on() -> None:
    scheduler = make_scheduler(2, 2)
    scheduler.note_free_bytes(scheduler.replicas[1], 2**30)
    submit(scheduler, make_task())
    take_all(scheduler)
    assert [slots.busy for slots in scheduler.replicas] == [0, 1]


def test_cancelling_a_task_before_it_starts_gives_its_slot_to_the_next() -> None:
    scheduler = make_scheduler(1, 1)
    first, second, third = (make_task() for _ in range(3))
    submit(scheduler, first, second)
    scheduler.cancel(first)
    submit(scheduler, third)
    assert take_all(scheduler) == [second, third]


def test_tasks_that_left_without_a_replica_are_counted_by_priority() -> None:
    scheduler = make_scheduler(1)
    submit(scheduler, first := make_task(), *(make_task(BATCH) for _ in range(3)))
    assert scheduler.cancel(first) is Found.WAITING
    assert len(scheduler.clear()) == 3
    assert scheduler.dropped == {INTERACTIVE: 1, BATCH: 3}


def prediction(scheduler: Scheduler[str]) -> tuple[int, int]:
    """Found in the queue and milliseconds to the start that the next task is told."""
    with scheduler.reservation(INTERACTIVE):
        answer = scheduler.submit(task := make_task())
    assert answer is task.accepted
    return answer.queue_position, answer.predicted_start_ms


def test_a_start_is_predicted_from_how_long_tasks_took_and_when_those_that_run_began() -> None:
    scheduler = make_scheduler(1, 1, clock=(clock := Clock()))
    serve(scheduler, clock, seconds=4)
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
        take_all(scheduler)
        slots = scheduler.replicas[idle]
        (running,) = slots.running.values()
        scheduler.release(slots, running.task, completed=False)
        assert prediction(scheduler) == (0, 0)


def test_a_replica_that_hangs_is_not_counted_on() -> None:
    scheduler = make_scheduler(1, 1, clock=(clock := Clock()))
    serve(scheduler, clock, seconds=2)
    submit(scheduler, make_task())
    take_all(scheduler)
    clock.now += 1
    submit(scheduler, make_task())
    take_all(scheduler)
    scheduler.note_stall(scheduler.replicas[0])
    assert prediction(scheduler) == (0, 2000)


def test_who_comes_while_a_slot_is_free_is_never_refused() -> None:
    scheduler = make_scheduler(1, capacity=1)
    submit(scheduler, running := make_task())
    take_all(scheduler)
    submit(scheduler, waiting := make_task())
    assert refused(scheduler)
    scheduler.release(scheduler.replicas[0], running, completed=False)
    assert take(scheduler, scheduler.replicas[0]) is waiting
    assert refused(scheduler) is None


def test_a_pool_without_a_ready_replica_still_bounds_and_predicts() -> None:
    scheduler = make_scheduler(1, capacity=2)
    scheduler.set_ready(scheduler.replicas[0], ready=False)
    submit(scheduler, make_task(), last := make_task())
    assert last.accepted is not None
    assert last.accepted.predicted_start_ms > 0
    assert refused(scheduler)
