"""What a worker does with its models: tasks that begin, end, are cancelled, outlive their model or the worker."""

from __future__ import annotations

import pytest

from engines.api import FinishReason, Prompt
from engines.errors import EngineDead
from orchd.errors import Code, DecodeTimeout
from orchd.pools.reports import Progress
from orchd.schemas import Priority
from testkit.builders import make_task
from tests.pools.rig import make_rig, running

LENGTH = (FinishReason.LENGTH, None)
CANCELLED = (FinishReason.CANCELLED, None)
RESET = (FinishReason.ERROR, Code.WORKER_RESET)


# --- when all is well ------------------------------------------------------------------------------------------------


def test_a_task_begins_gets_its_text_and_ends() -> None:
    rig = make_rig()
    task = rig.submit(max_tokens=3)
    rig.rounds(4)
    assert rig.texts(task) == ["<120.0>", "<120.1>", "<120.2>"]
    assert rig.end_of(task) == LENGTH
    replica = rig.pools[0].replicas[0]
    assert (replica.tokens_in, replica.tokens_out, task.tokens_out) == (1, 3, 3)
    rig.check_all_ended()


def test_only_the_first_text_of_each_task_is_marked_as_first() -> None:
    rig = make_rig(slots=2)
    tasks = [rig.submit(max_tokens=3) for _ in range(2)]
    rig.rounds(4)
    for task in tasks:
        marks = [report.first for report in rig.reports if isinstance(report, Progress) and report.task is task]
        assert marks == [True, False, False]


@pytest.mark.parametrize("wanted", [True, False])
def test_reasoning_is_told_to_a_task_that_asked_for_it(wanted: bool) -> None:
    rig = make_rig()
    rig.pools[0].models[0].thinks = 2
    task = make_task(max_tokens=3, pool_id="0", reasoning=wanted)
    task.prompt = Prompt(task.tokens, reply="")
    rig.put(task)
    rig.rounds(4)
    told = [report for report in rig.reports if isinstance(report, Progress)]
    thoughts = [("<120.0>", 0, True), ("<120.1>", 1, True)] if wanted else []
    assert [(one.text, one.index, one.reasoning) for one in told] == [*thoughts, ("<120.2>", 2, False)]
    assert [one.first for one in told] == [True, *[False] * len(thoughts)]
    assert task.tokens_out == 3


def test_what_is_known_is_told_before_a_step_that_may_be_long() -> None:
    with running(make_rig(gated=True)) as rig:
        task = rig.submit()
        rig.pools[0].models[0].await_gate()
        assert rig.begun() == [task]
        rig.pools[0].models[0].allow(1)
        rig.await_ends(task)


def test_a_round_without_anything_to_step_says_so() -> None:
    rig = make_rig()
    assert not rig.workers[0].round()
    rig.submit()
    assert rig.workers[0].round()
    assert not rig.workers[0].round()


def test_freed_slots_are_filled_in_the_next_round_in_order_without_an_event_loop() -> None:
    with running(make_rig(workers=2, slots=2)) as rig:
        tasks = [rig.submit(max_tokens=3, priority=list(Priority)[n % 2]) for n in range(40)]
        rig.await_ends(*tasks)
        rig.check_all_ended()


def test_a_freed_slot_is_filled_one_round_later() -> None:
    rig = make_rig(slots=1)
    first, second = rig.submit(max_tokens=2), rig.submit()
    rig.rounds(2)
    assert rig.end_of(first) == LENGTH
    assert rig.begun() == [first]
    rig.rounds(1)
    assert rig.begun() == [first, second]


def test_two_pools_on_one_device_are_stepped_in_turn() -> None:
    rig = make_rig(pools=2, slots=4)
    tasks = [rig.submit(pool=0, max_tokens=50) for _ in range(4)] + [rig.submit(pool=1, max_tokens=50)]
    rig.rounds(50)
    busy, quiet = rig.pools[0].models[0], rig.pools[1].models[0]
    assert len(busy.stepped) == len(quiet.stepped) == 50
    assert [rig.end_of(task) for task in tasks] == [LENGTH] * 5


# --- cancelling ------------------------------------------------------------------------------------------------------


def test_a_cancelled_tasks_slot_is_free_within_one_step() -> None:
    with running(make_rig(slots=1, gated=True)) as rig:
        model = rig.pools[0].models[0]
        task, waiting = rig.submit(max_tokens=100), rig.submit()
        model.await_gate()
        rig.cancel(task)
        model.allow(1)
        rig.await_ends(task)
        assert rig.end_of(task) == CANCELLED
        model.await_gate()
        assert model.admitted == [task.id, waiting.id]
        assert model.stepped == [(task.id,)]
        model.allow(1)
        rig.await_ends(waiting)


def test_cancelling_a_task_that_ended_in_this_very_step_changes_nothing() -> None:
    with running(make_rig(gated=True)) as rig:
        model = rig.pools[0].models[0]
        task = rig.submit()
        model.await_gate()
        rig.cancel(task)  # still running as far as anyone knows
        model.allow(1)
        rig.await_ends(task)
        assert rig.end_of(task) == LENGTH
        model.allow(1)
        rig.await_ends(rig.submit())  # the cancel has been looked at by then
        assert model.cancelled == []


def test_a_cancel_between_two_rounds_ends_the_task_once() -> None:
    rig = make_rig()
    task, other = rig.submit(max_tokens=5), rig.submit(max_tokens=5)
    rig.rounds(2)
    rig.cancel(task)
    rig.cancel(task)
    rig.rounds(5)
    assert rig.end_of(task) == CANCELLED
    assert len(rig.texts(task)) == 2
    assert rig.end_of(other) == LENGTH
    assert rig.pools[0].models[0].cancelled == [task.id]
    rig.check_all_ended()


# --- models that were replaced ---------------------------------------------------------------------------------------


def test_tasks_end_on_the_model_they_began_on_and_then_it_is_closed() -> None:
    rig = make_rig(slots=2)
    old = rig.pools[0].models[0]
    first = rig.submit(max_tokens=4)
    rig.rounds(1)
    new = rig.replace(0, 0)
    second = rig.submit(max_tokens=2)
    rig.rounds(2)
    assert (old.closes, rig.closed()) == (0, [])
    rig.rounds(2)
    assert (old.admitted, new.admitted) == ([first.id], [second.id])
    assert [rig.end_of(first), rig.end_of(second)] == [LENGTH] * 2
    assert (old.closes, new.closes, len(rig.closed())) == (1, 0, 1)


def test_a_replaced_model_that_fails_leaves_the_new_one_alone() -> None:
    rig = make_rig(slots=2)
    old = rig.pools[0].models[0]
    lost = rig.submit(max_tokens=9)
    rig.rounds(1)
    rig.replace(0, 0)
    untouched = rig.submit(max_tokens=4)
    old.always = EngineDead("dead")
    old.reset_faults.append(EngineDead("dead"))
    rig.rounds(5)
    assert rig.end_of(lost) == RESET
    assert rig.end_of(untouched) == LENGTH
    assert rig.down() == []
    assert old.closes == 1


def test_tasks_can_be_ended_from_outside() -> None:
    rig = make_rig()
    tasks = [rig.submit(max_tokens=9) for _ in range(2)]
    rig.rounds(1)
    rig.workers[0].end_tasks(rig.pools[0].replicas[0], DecodeTimeout("late"))
    rig.rounds(1)
    assert [rig.end_of(task) for task in tasks] == [(FinishReason.ERROR, Code.DECODE_TIMEOUT)] * 2
    assert not rig.pools[0].models[0].busy


# --- stopping --------------------------------------------------------------------------------------------------------


def test_stopping_ends_what_runs_as_cancelled_and_closes_every_model() -> None:
    with running(make_rig(pools=2, gated=True)) as rig:
        tasks = [rig.submit(pool=0, max_tokens=9), rig.submit(pool=1, max_tokens=9)]
        rig.pools[0].models[0].await_gate()
        rig.workers[0].stop()
        for pool in rig.pools:
            pool.models[0].allow(10)
    assert [rig.end_of(task) for task in tasks] == [CANCELLED] * 2
    assert [pool.models[0].closes for pool in rig.pools] == [1, 1]


def test_a_model_handed_over_at_the_last_moment_is_closed_too() -> None:
    rig = make_rig()
    late = rig.replace(0, 0)
    with running(rig):
        rig.workers[0].stop()
    assert late.closes == 1


def test_a_worker_that_never_started_can_be_stopped_and_joined() -> None:
    rig = make_rig()
    rig.workers[0].stop()
    assert rig.workers[0].join(0)
