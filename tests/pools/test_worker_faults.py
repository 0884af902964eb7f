"""What becomes of a worker and its tasks when a model fails, refuses or hangs."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.api import FinishReason
from engines.errors import DecodeFailed, EngineDead
from orchd.errors import Code
from orchd.pools.replica import Instance
from orchd.pools.worker import MAX_FAILURES
from orchd.schemas import Priority
from testkit.fake_engine import FakeModel, Hang
from tests.pools.rig import make_rig, running

LENGTH = (FinishReason.LENGTH, None)
CANCELLED = (FinishReason.CANCELLED, None)
RESET = (FinishReason.ERROR, Code.WORKER_RESET)
FAULTS = [DecodeFailed("fault"), RuntimeError("fault"), MemoryError()]


NOT_NUMBERS = (FinishReason.ERROR, Code.INTERNAL)


# --- a sequence without logits ---------------------------------------------------------------------------------------


def test_a_task_that_the_model_computes_no_numbers_for_ends_alone() -> None:
    rig = make_rig(slots=3)
    tasks = [rig.submit(max_tokens=3) for _ in range(3)]
    waiting = rig.submit()
    rig.rounds(1)
    model = rig.pools[0].models[0]
    model.not_numbers.add(tasks[1].id)
    rig.rounds(3)
    assert [rig.end_of(task) for task in (*tasks, waiting)] == [LENGTH, NOT_NUMBERS, LENGTH, LENGTH]
    assert (model.resets, model.closes, rig.down()) == (0, 0, [])
    rig.check_all_ended()


def test_any_number_of_them_in_a_row_leaves_the_replica_up() -> None:
    rig = make_rig(slots=1)
    tasks = [rig.submit() for _ in range(2 * MAX_FAILURES)]
    rig.pools[0].models[0].not_numbers.update(task.id for task in tasks)
    rig.rounds(2 * MAX_FAILURES)
    assert [rig.end_of(task) for task in tasks] == [NOT_NUMBERS] * len(tasks)
    assert rig.down() == []
    rig.check_all_ended()


# --- a step that raises ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS)
def test_a_step_that_raises_ends_its_tasks_resets_the_model_and_goes_on(fault: Exception) -> None:
    rig = make_rig(slots=2)
    lost = [rig.submit(max_tokens=5) for _ in range(2)]
    later = rig.submit(max_tokens=2)
    model = rig.pools[0].models[0]
    model.step_faults.extend([None, fault])
    rig.rounds(5)
    assert [rig.end_of(task) for task in lost] == [RESET] * 2
    assert rig.texts(lost[0]) == ["<120.0>"]
    assert rig.end_of(later) == LENGTH
    assert (model.resets, model.closes, rig.down()) == (1, 0, [])
    rig.check_all_ended()


def test_other_pools_on_the_device_do_not_notice() -> None:
    rig = make_rig(pools=2)
    rig.pools[0].models[0].always = DecodeFailed("always")
    lost = [rig.submit(pool=0, max_tokens=9) for _ in range(MAX_FAILURES)]
    untouched = rig.submit(pool=1, max_tokens=9)
    rig.rounds(9)
    assert rig.end_of(lost[0]) == RESET
    assert rig.end_of(untouched) == LENGTH
    assert len(rig.pools[1].models[0].stepped) == 9


def test_the_third_failure_in_a_row_gives_the_replica_up() -> None:
    rig = make_rig(slots=1)
    tasks = [rig.submit() for _ in range(4)]
    rig.pools[0].models[0].always = DecodeFailed("always")
    rig.rounds(6)
    assert [rig.end_of(task) for task in tasks[:3]] == [RESET] * 3
    replica = rig.pools[0].replicas[0]
    assert rig.down() == [replica]
    assert (replica.slots.ready, replica.instances, replica.setbacks) == (False, [], 1)
    assert rig.pools[0].models[0].closes == 1
    assert rig.pools[0].scheduler.waiting() == [tasks[3]]


def test_a_good_step_between_failures_forgives_them() -> None:
    rig = make_rig(slots=1)
    rig.pools[0].models[0].step_faults.extend([FAULTS[0], FAULTS[0], None, FAULTS[0], FAULTS[0]])
    tasks = [rig.submit() for _ in range(6)]
    rig.rounds(6)
    assert [rig.end_of(task) for task in tasks] == [RESET, RESET, LENGTH, RESET, RESET, LENGTH]
    assert rig.down() == []


def test_a_reset_that_fails_gives_the_replica_up_at_once() -> None:
    rig = make_rig(slots=1)
    model = rig.pools[0].models[0]
    model.step_faults.append(DecodeFailed("fault"))
    model.reset_faults.append(EngineDead("gone"))
    task = rig.submit()
    rig.rounds(2)
    assert rig.end_of(task) == RESET
    assert len(rig.down()) == 1
    assert model.closes == 1


def test_waiting_tasks_move_to_the_replica_that_is_left() -> None:
    rig = make_rig(workers=2, slots=1)
    rig.pools[0].models[0].always = DecodeFailed("always")
    tasks = [rig.submit(max_tokens=2) for _ in range(8)]
    rig.rounds(20)
    assert len(rig.down()) == 1
    outcomes = [rig.end_of(task) for task in tasks]
    assert outcomes.count(RESET) == MAX_FAILURES
    assert outcomes.count(LENGTH) == 8 - MAX_FAILURES
    rig.check_all_ended()


def test_a_replica_that_comes_back_takes_tasks_again() -> None:
    rig = make_rig(slots=1)
    rig.pools[0].models[0].always = DecodeFailed("always")
    for _ in range(MAX_FAILURES):
        rig.submit()
    waiting = rig.submit()
    rig.rounds(5)
    rig.replace(0, 0)
    rig.rounds(2)
    assert rig.end_of(waiting) == LENGTH
    assert rig.pools[0].replicas[0].setbacks == 0
    rig.check_all_ended()


class _BadModel(FakeModel):
    """Breaks every promise of `engines.api.LoadedModel` that can be broken without a crash."""

    def cancel(self, key: str) -> bool:
        super().cancel(key)
        raise RuntimeError("cancel")

    def close(self) -> None:
        super().close()
        raise RuntimeError("close")


def test_a_model_that_fails_at_everything_does_not_take_its_worker_along() -> None:
    rig = make_rig(slots=2)
    bad = _BadModel(2)
    replica = rig.pools[0].replicas[0]
    instance = Instance(bad)
    rig.pools[0].scheduler.switch([instance], {})
    rig.workers[0].adopt(replica, instance)
    tasks = [rig.submit(max_tokens=9) for _ in range(9)]
    rig.rounds(1)
    rig.cancel(tasks[0])
    rig.rounds(1)
    assert rig.end_of(tasks[0]) == CANCELLED
    bad.always = RuntimeError("step")
    rig.rounds(4)
    assert rig.down() == [replica]
    rig.replace(0, 0)
    rig.rounds(12)
    rig.submit()
    rig.rounds(2)
    rig.check_all_ended()


def test_events_for_a_task_that_has_ended_are_ignored() -> None:
    rig = make_rig()
    model = rig.pools[0].models[0]
    step = model.step
    model.step = lambda beside: step(beside) * 2  # type: ignore[method-assign, misc, assignment]  # a model that repeats itself
    task = rig.submit()
    rig.rounds(2)
    assert rig.end_of(task) == LENGTH


def test_a_command_that_fails_does_not_end_the_worker() -> None:
    def fail() -> None:
        raise RuntimeError("command")

    with running(make_rig()) as rig:
        rig.workers[0].do(fail)
        task = rig.submit()
        rig.await_ends(task)


# --- admission -------------------------------------------------------------------------------------------------------


def test_an_admission_that_fails_ends_only_that_task() -> None:
    rig = make_rig(slots=2)
    good, bad, later = (rig.submit(max_tokens=2) for _ in range(3))
    rig.pools[0].models[0].admit_faults[bad.id] = RuntimeError("no")
    rig.rounds(4)
    assert rig.end_of(bad) == (FinishReason.ERROR, Code.INTERNAL)
    assert rig.end_of(good) == rig.end_of(later) == LENGTH
    assert rig.pools[0].models[0].resets == 0
    rig.check_all_ended()


def test_why_an_admission_failed_is_in_the_log_and_not_in_the_answer(caplog: pytest.LogCaptureFixture) -> None:
    rig = make_rig()
    task = rig.submit()
    rig.pools[0].models[0].admit_faults[task.id] = RuntimeError("at 0x7f3a in /home/me")
    rig.rounds(1)
    (end,) = rig.ends()[task.id]
    assert str(end.error) == "the task could not be started; see the server's log"
    assert "at 0x7f3a in /home/me" in caplog.text


def test_a_dead_model_does_not_eat_the_queue() -> None:
    rig = make_rig(slots=1)
    tasks = [rig.submit() for _ in range(5)]
    rig.pools[0].models[0].admit_faults = {task.id: EngineDead("dead") for task in tasks}
    rig.rounds(3)
    assert rig.end_of(tasks[0]) == (FinishReason.ERROR, Code.INTERNAL)
    assert rig.down() == [rig.pools[0].replicas[0]]
    assert rig.pools[0].scheduler.waiting() == tasks[1:]


# --- hanging ---------------------------------------------------------------------------------------------------------


def test_a_step_that_hangs_shows_and_goes_on_when_it_returns() -> None:
    with running(make_rig(pools=1)) as rig:
        hang = Hang()
        rig.pools[0].models[0].step_faults.append(hang)
        task = rig.submit(max_tokens=2)
        assert hang.began.wait(20)
        rig.clock.now += 61
        assert rig.workers[0].stalled_s() == 61
        hang.release.set()
        rig.await_ends(task)
        assert rig.end_of(task) == LENGTH


def test_an_idle_worker_is_not_stalled() -> None:
    with running(make_rig()) as rig:
        rig.await_ends(rig.submit())
        idle = Hang()
        rig.workers[0].do(idle.began.set)
        assert idle.began.wait(20)
        while rig.workers[0].stalled_s():  # until it waits again
            rig.clock.now += 1
        rig.clock.now += 1000
        assert rig.workers[0].stalled_s() == 0


# --- all of it at once -----------------------------------------------------------------------------------------------

FAULT = st.sampled_from(["step", "dead", "admit", "reset", "cancel", "replace", "back", "submit", "round", "time"])


@settings(max_examples=150, deadline=None)
@given(
    plan=st.lists(st.tuples(FAULT, st.integers(0, 7)), max_size=60), workers=st.integers(1, 2), slots=st.integers(1, 3)
)
def test_every_accepted_task_gets_exactly_one_end_whatever_fails(
    plan: list[tuple[str, int]], workers: int, slots: int
) -> None:
    rig = make_rig(workers=workers, pools=2, slots=slots, capacity=1000)
    for what, number in plan:
        pool, replica = number % 2, number // 2 % workers
        model = rig.pools[pool].models[replica]
        if what == "submit":
            rig.submit(pool=pool, max_tokens=1 + number, priority=list(Priority)[number // 4])
        elif what == "step":
            model.step_faults.extend([FAULTS[number % 3]] * (1 + number // 2))
        elif what == "dead":
            model.step_faults.append(FAULTS[0])
            model.reset_faults.append(EngineDead("dead"))
        elif what == "reset":
            model.reset_faults.append(FAULTS[number % 3])
        elif what == "admit":
            task = rig.submit(pool=pool, max_tokens=2)
            for each in rig.pools[pool].models:
                each.admit_faults[task.id] = EngineDead("dead") if number > 5 else FAULTS[1]
        elif what == "cancel" and rig.accepted:
            rig.cancel(rig.accepted[-1 - number % len(rig.accepted)])
        elif what == "replace" or (what == "back" and not rig.pools[pool].replicas[replica].slots.ready):
            rig.replace(pool, replica)
        elif what == "time":
            rig.clock.now += number
        elif what == "round":
            rig.rounds(1 + number // 3)
        rig.check()
    for pool in range(2):
        for replica in range(workers):
            rig.replace(pool, replica)
    rig.rounds(3)
    while any(
        made.scheduler.waiting() or any(slots.running for slots in made.scheduler.replicas) for made in rig.pools
    ):
        rig.rounds(1)
        for index, made in enumerate(rig.pools):
            for there in made.replicas:
                if not there.slots.ready:
                    rig.replace(index, there.slots.index)
    rig.check_all_ended()
