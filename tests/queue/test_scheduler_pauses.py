"""How long the scheduler tells a refused sender to wait, by what its tasks have taken so far."""

from __future__ import annotations

from orchd.queue.scheduler import Scheduler
from orchd.queue.tasks import Task
from orchd.schemas import Priority
from testkit.builders import Clock, make_task
from tests.queue.queueing import make_scheduler, refused, serve, submit, take_all

BATCH = Priority.BATCH


def busy(scheduler: Scheduler[str], *, max_tokens: int, ignore_eos: bool = False) -> Task:
    """A task on the only slot."""
    submit(scheduler, task := make_task(max_tokens=max_tokens, ignore_eos=ignore_eos))
    assert take_all(scheduler) == [task]
    return task


def write(task: Task, tokens: int, clock: Clock, *, token_s: float) -> None:
    """So many more tokens at that pace."""
    task.first_token_at = task.first_token_at or clock.now
    clock.now += tokens * token_s
    task.tokens_out += tokens


def write_thirty_short_ones(scheduler: Scheduler[str], clock: Clock) -> None:
    """Tasks of 20 tokens each, one after the other."""
    for _ in range(30):
        short = busy(scheduler, max_tokens=2000)
        write(short, 20, clock, token_s=0.08)
        scheduler.release(scheduler.replicas[0], short, completed=True)


def test_forty_senders_who_never_return_cost_the_next_one_nothing() -> None:
    scheduler = make_scheduler(1, capacity=8, clock=(clock := Clock()))
    serve(scheduler, clock, seconds=1)
    submit(scheduler, *(make_task() for _ in range(9)))
    take_all(scheduler)
    pauses = [refused(scheduler) or 0 for _ in range(41)]
    assert max(pauses) < 3
    assert min(pauses) >= 1
    assert len({round(pause, 2) for pause in pauses}) > 20, "they would all come at once"


def test_after_short_tasks_the_pause_grows_with_a_long_one_and_never_says_now() -> None:
    """One slot, capacity 1, thirty short tasks, then two of 1,500 tokens: once told 5 ms for two minutes."""
    scheduler = make_scheduler(1, capacity=1, clock=(clock := Clock()))
    write_thirty_short_ones(scheduler, clock)
    long = busy(scheduler, max_tokens=2000)
    submit(scheduler, make_task(max_tokens=2000))
    told = []
    while long.tokens_out < 1500:
        pause_s = refused(scheduler)
        assert pause_s is not None
        told.append(pause_s)
        write(long, max(1, round(pause_s / 0.08)), clock, token_s=0.08)
    assert len(told) <= 7, "a client that obeys asks too often"
    assert told[-1] > 10 * told[0]
    assert min(told) > 1


def test_a_task_that_nothing_else_can_end_is_waited_for_to_its_last_token() -> None:
    scheduler = make_scheduler(1, capacity=1, clock=(clock := Clock()))
    write_thirty_short_ones(scheduler, clock)
    long = busy(scheduler, max_tokens=1500, ignore_eos=True)
    submit(scheduler, make_task(max_tokens=20))
    write(long, 100, clock, token_s=0.08)
    pause_s = refused(scheduler)
    assert pause_s is not None
    assert pause_s >= 1400 * 0.08


def test_batch_senders_do_not_make_interactive_ones_wait_longer() -> None:
    scheduler = make_scheduler(1, capacity=8, clock=(clock := Clock()))
    serve(scheduler, clock, seconds=1)
    submit(scheduler, *(make_task() for _ in range(9)))
    take_all(scheduler)
    for _ in range(5):  # they do come back, all of them
        for name in "abcdefghij":
            refused(scheduler, BATCH, name)
    assert min(refused(scheduler, BATCH) or 0 for _ in range(10)) > 2 * max(refused(scheduler) or 0 for _ in range(10))
