"""The queue against a plain model of it: order, bound, one place for each task, no idle slot, exact counts."""

from __future__ import annotations

import array
import random
import threading
from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from orchd.errors import AdmissionReject
from orchd.scheduler import Place, Scheduler, Seat
from orchd.schemas import Priority
from orchd.tasks import Task
from tests.core.builders import Clock, make_task, pause_of

INTERACTIVE, BATCH = Priority.INTERACTIVE, Priority.BATCH
priorities = st.sampled_from(Priority)


def make_scheduler(*slots: int, capacity: int = 64, clock: Clock | None = None) -> Scheduler:
    seats = [Seat(index, count, ready=True, host=f"host {index}") for index, count in enumerate(slots)]
    return Scheduler(capacity, seats, clock=clock or Clock())


def submit(scheduler: Scheduler, *tasks: Task) -> None:
    for task in tasks:
        scheduler.reserve()
        scheduler.submit(task)


def take(scheduler: Scheduler, seat: Seat) -> Task | None:
    found = scheduler.next_for(seat)
    return None if found is None else found[0]


def take_all(scheduler: Scheduler) -> list[Task]:
    """What the workers start when each has a turn."""
    taken = []
    for seat in scheduler.seats:
        while (found := take(scheduler, seat)) is not None:
            taken.append(found)
    return taken


# --- the state machine ------------------------------------------------------------------------------------------------


class SchedulerMachine(RuleBasedStateMachine):
    """Random lives of a pool beside lists that say what must be so."""

    @initialize(slots=st.lists(st.integers(1, 3), min_size=1, max_size=3), capacity=st.integers(1, 5))
    def set_up(self, slots: list[int], capacity: int) -> None:
        self.clock = Clock()
        self.scheduler = make_scheduler(*slots, capacity=capacity, clock=self.clock)
        self.waiting: dict[Priority, list[Task]] = {INTERACTIVE: [], BATCH: []}
        self.running: list[list[Task]] = [[] for _ in slots]
        self.gone: list[Task] = []
        self.reserved = 0
        self.pauses: list[float] = []
        self.accepted = 0

    @property
    def free_slots(self) -> int:
        seats = self.scheduler.seats
        return sum(s.slots - len(self.running[s.index]) for s in seats if s.ready and not s.stalled)

    @property
    def all_waiting(self) -> list[Task]:
        return self.waiting[INTERACTIVE] + self.waiting[BATCH]

    def _reserve(self) -> bool:
        room = self.scheduler.capacity + self.free_slots - len(self.all_waiting) - self.reserved
        idle = self.free_slots > len(self.all_waiting) + self.reserved
        try:
            self.scheduler.reserve()
        except AdmissionReject as error:
            assert not (idle and room > 0), "refused beside an idle slot"
            self.pauses.append(pause_of(error))
            return False
        assert room > 0, "the bound was exceeded"
        return True

    def _submit(self, priority: Priority) -> None:
        task = make_task(priority)
        ahead = len(self.all_waiting if priority is BATCH else self.waiting[INTERACTIVE])
        claims = sum(seat.claims for seat in self.scheduler.seats)
        answer, seat = self.scheduler.submit(task)
        self.accepted += 1
        self.waiting[priority].append(task)
        assert answer.queue_position == max(0, ahead - claims)
        assert answer.predicted_start_ms >= 0
        assert answer.backoff_ms >= 0
        if seat is not None:
            assert self.scheduler.seats[seat].ready
            assert self.scheduler.seats[seat].claims

    @rule(priority=priorities)
    def submit(self, priority: Priority) -> None:
        if self._reserve():
            self._submit(priority)

    @rule()
    def reserve(self) -> None:
        self.reserved += self._reserve()

    @precondition(lambda self: self.reserved)
    @rule(priority=priorities)
    def submit_reserved(self, priority: Priority) -> None:
        self.reserved -= 1
        self._submit(priority)

    @precondition(lambda self: self.reserved)
    @rule()
    def release_place(self) -> None:
        self.reserved -= 1
        self.scheduler.release_place()

    @precondition(lambda self: self.all_waiting)
    @rule(data=st.data())
    def cancel_waiting(self, data: st.DataObject) -> None:
        task = data.draw(st.sampled_from(self.all_waiting))
        assert self.scheduler.cancel(task) is Place.WAITING
        self.waiting[task.priority].remove(task)
        self.gone.append(task)
        assert self.scheduler.cancel(task) is Place.GONE

    @precondition(lambda self: any(self.running))
    @rule(data=st.data(), completed=st.booleans())
    def end(self, data: st.DataObject, completed: bool) -> None:
        index = data.draw(st.sampled_from([i for i, tasks in enumerate(self.running) if tasks]))
        task = data.draw(st.sampled_from(self.running[index]))
        assert self.scheduler.cancel(task) is Place.RUNNING
        self.scheduler.release(self.scheduler.seats[index], task, completed=completed)
        self.running[index].remove(task)
        self.gone.append(task)

    def _turn(self, seat: Seat) -> None:
        while (found := self.scheduler.next_for(seat)) is not None:
            task, host = found
            assert host == seat.host
            first = self.waiting[INTERACTIVE] or self.waiting[BATCH]
            assert task is first.pop(0), "not the first in line"
            self.running[seat.index].append(task)
            assert len(self.running[seat.index]) <= seat.slots

    @rule(data=st.data())
    def worker_turn(self, data: st.DataObject) -> None:
        self._turn(data.draw(st.sampled_from(self.scheduler.seats)))

    @rule()
    def all_workers_turn(self) -> None:
        for seat in self.scheduler.seats:
            self._turn(seat)
        assert not (self.all_waiting and self.free_slots), "a task waits beside an idle slot"

    @rule(data=st.data())
    def replica_goes_and_comes(self, data: st.DataObject) -> None:
        seat = data.draw(st.sampled_from(self.scheduler.seats))
        if seat.ready:  # its worker ends what it runs
            self.scheduler.set_ready(seat, ready=False)
            for task in self.running[seat.index]:
                self.scheduler.release(seat, task, completed=False)
            self.gone += self.running[seat.index]
            self.running[seat.index] = []
            assert self.scheduler.next_for(seat) is None
        else:
            self.scheduler.set_ready(seat, ready=True)

    @rule(data=st.data())
    def stall(self, data: st.DataObject) -> None:
        seat = data.draw(st.sampled_from(self.scheduler.seats))
        self.scheduler.note_stall(seat)
        assert not seat.free
        assert not seat.claims

    @rule(data=st.data())
    def memory_changes(self, data: st.DataObject) -> None:
        self.scheduler.note_free_bytes(data.draw(st.sampled_from(self.scheduler.seats)), data.draw(st.integers(0, 3)))

    @rule(seconds=st.floats(0, 10))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule()
    def drain_waiting(self) -> None:
        assert self.scheduler.drain_waiting() == self.all_waiting
        self.gone += self.all_waiting
        self.waiting = {INTERACTIVE: [], BATCH: []}

    @invariant()
    def nothing_is_lost_or_doubled(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        scheduler = self.scheduler
        scheduler.check_integrity()
        assert min(self.pauses, default=1) > 0
        assert {id(task) for task in scheduler.waiting()} == {id(task) for task in self.all_waiting}
        assert [set(seat.running) for seat in scheduler.seats] == [{t.id for t in tasks} for tasks in self.running]
        assert scheduler.depth() == {priority: len(self.waiting[priority]) for priority in Priority}
        left = sum(sum(seat.enqueued.values()) for seat in scheduler.seats) + sum(scheduler.dropped.values())
        assert self.accepted == left + len(self.all_waiting)
        assert self.accepted == len(self.all_waiting) + sum(map(len, self.running)) + len(self.gone)


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=600, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


# --- one behaviour each -----------------------------------------------------------------------------------------------


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


def test_cancelled_tasks_do_not_pile_up_in_the_heap() -> None:
    scheduler = make_scheduler(1, capacity=1000)
    for _ in range(20):
        tasks = [make_task() for _ in range(500)]
        submit(scheduler, *tasks)
        for task in tasks:
            assert scheduler.cancel(task) is Place.WAITING
    assert len(scheduler._heap) <= 64
    assert scheduler.dropped[INTERACTIVE] == 10_000


@pytest.mark.parametrize(
    ("tasks", "sizes"), [(300, [300, 149, 74, 36]), (131, [131, 65, 32]), (129, [129, 64]), (64, [64])]
)
def test_the_heap_is_rebuilt_only_where_it_is_large_and_most_of_it_is_gone(tasks: int, sizes: list[int]) -> None:
    scheduler = make_scheduler(1, capacity=1000)
    submit(scheduler, *(waiting := [make_task() for _ in range(tasks)]))
    seen = [tasks]
    for task in waiting:
        scheduler.cancel(task)
        seen.append(len(scheduler._heap))
    assert list(dict.fromkeys(seen)) == sizes


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


# --- real threads -----------------------------------------------------------------------------------------------------


def test_threads_that_submit_cancel_and_pull_at_once_lose_and_double_nothing() -> None:
    scheduler = make_scheduler(3, 2, 1, capacity=20)
    accepted: list[Task] = []
    cancelled: list[Task] = []
    ended: list[Task] = []
    failures: list[BaseException] = []
    submitting = threading.Barrier(4)
    done = threading.Event()

    def guarded(work: object) -> None:
        try:
            assert callable(work)
            work()
        except BaseException as error:
            failures.append(error)

    def send(seed: int) -> None:
        choose = random.Random(seed)
        mine: list[Task] = []
        submitting.wait()
        for _ in range(800):
            try:
                scheduler.reserve()
            except AdmissionReject:
                pass
            else:
                task = make_task(choose.choice(list(Priority)))
                scheduler.submit(task)
                mine.append(task)
            if mine and choose.random() < 0.3 and scheduler.cancel(task := choose.choice(mine)) is Place.WAITING:
                cancelled.append(task)
        accepted.extend(mine)

    def work(seat: Seat, seed: int) -> None:
        choose = random.Random(seed)
        running: list[Task] = []
        while not done.is_set() or running or scheduler.waiting():
            while (found := take(scheduler, seat)) is not None:
                running.append(found)
                assert len(running) <= seat.slots
            if running:
                task = running.pop(choose.randrange(len(running)))
                scheduler.release(seat, task, completed=True)
                ended.append(task)

    def flicker() -> None:
        while not done.is_set():
            scheduler.note_stall(scheduler.seats[0])
            scheduler.check_integrity()
            scheduler.depth()

    senders = [threading.Thread(target=guarded, args=(lambda n=n: send(n),)) for n in range(4)]
    others = [threading.Thread(target=guarded, args=(lambda s=s: work(s, s.index),)) for s in scheduler.seats]
    others.append(threading.Thread(target=guarded, args=(flicker,)))
    for thread in senders + others:
        thread.start()
    for thread in senders:
        thread.join(30)
    done.set()
    for thread in others:
        thread.join(30)
    assert not any(thread.is_alive() for thread in senders + others)
    assert not failures
    assert Counter(map(id, accepted)) == Counter(map(id, ended + cancelled))
    assert sum(sum(seat.enqueued.values()) for seat in scheduler.seats) == len(ended)
    assert sum(scheduler.dropped.values()) == len(cancelled)
    scheduler.check_integrity()
