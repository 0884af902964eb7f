"""The queue against a plain model of it: order, bound, one place for each task, no idle slot, exact counts."""

from __future__ import annotations

import contextlib
import random
import threading
from collections import Counter

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from orchd.errors import AdmissionReject
from orchd.queue.scheduler import Found
from orchd.queue.slots import ReplicaSlots
from orchd.queue.tasks import Task
from orchd.schemas import Priority
from testkit.builders import Clock, make_task, pause_of
from tests.queue.queueing import AWAKE, make_scheduler, take

INTERACTIVE, BATCH = Priority.INTERACTIVE, Priority.BATCH
priorities = st.sampled_from(Priority)


class SchedulerMachine(RuleBasedStateMachine):
    """Random lives of a pool beside lists that say what must be so."""

    @initialize(slots=st.lists(st.integers(1, 3), min_size=1, max_size=3), capacity=st.integers(1, 5))
    def set_up(self, slots: list[int], capacity: int) -> None:
        self.clock = Clock()
        self.scheduler = make_scheduler(*slots, capacity=capacity, clock=self.clock)
        self.waiting: dict[Priority, list[Task]] = {INTERACTIVE: [], BATCH: []}
        self.running: list[list[Task]] = [[] for _ in slots]
        self.gone: list[Task] = []
        self.reserved: list[contextlib.ExitStack] = []
        self.pauses: list[float] = []
        self.accepted = 0

    @property
    def free_slots(self) -> int:
        replicas = self.scheduler.replicas
        return sum(s.total - len(self.running[s.index]) for s in replicas if s.ready and not s.stalled)

    @property
    def all_waiting(self) -> list[Task]:
        return self.waiting[INTERACTIVE] + self.waiting[BATCH]

    def _reserve(self, priority: Priority) -> bool:
        room = self.scheduler.capacity + self.free_slots - len(self.all_waiting) - len(self.reserved)
        reservation = contextlib.ExitStack()
        try:
            reservation.enter_context(self.scheduler.reservation(priority))
        except AdmissionReject as error:
            assert room <= 0, "refused although there is room"
            self.pauses.append(pause_of(error))
            return False
        assert room > 0, "the bound was exceeded"
        self.reserved.append(reservation)
        return True

    def _submit(self, priority: Priority) -> None:
        task = make_task(priority)
        ahead = len(self.all_waiting if priority is BATCH else self.waiting[INTERACTIVE])
        free_slots = self.free_slots
        with self.reserved.pop():
            answer = self.scheduler.submit(task)
        self.accepted += 1
        self.waiting[priority].append(task)
        assert answer.queue_position == max(0, ahead - free_slots)
        assert answer.predicted_start_ms >= 0
        assert answer.backoff_ms >= 0

    @rule(priority=priorities)
    def submit(self, priority: Priority) -> None:
        if self._reserve(priority):
            self._submit(priority)

    @rule(priority=priorities)
    def reserve(self, priority: Priority) -> None:
        self._reserve(priority)

    @precondition(lambda self: self.reserved)
    @rule(priority=priorities)
    def submit_reserved(self, priority: Priority) -> None:
        self._submit(priority)

    @precondition(lambda self: self.reserved)
    @rule()
    def release_place(self) -> None:
        self.reserved.pop().close()

    @precondition(lambda self: self.all_waiting)
    @rule(data=st.data())
    def cancel_waiting(self, data: st.DataObject) -> None:
        task = data.draw(st.sampled_from(self.all_waiting))
        assert self.scheduler.cancel(task) is Found.WAITING
        self.waiting[task.priority].remove(task)
        self.gone.append(task)
        assert self.scheduler.cancel(task) is Found.GONE

    @precondition(lambda self: any(self.running))
    @rule(data=st.data(), completed=st.booleans())
    def end(self, data: st.DataObject, completed: bool) -> None:
        index = data.draw(st.sampled_from([i for i, tasks in enumerate(self.running) if tasks]))
        task = data.draw(st.sampled_from(self.running[index]))
        assert self.scheduler.cancel(task) is Found.RUNNING
        self.scheduler.release(self.scheduler.replicas[index], task, completed=completed)
        self.running[index].remove(task)
        self.gone.append(task)
        AWAKE[self.scheduler].add(index)  # it is its worker that ends a task

    def _turn(self, slots: ReplicaSlots[str]) -> None:
        AWAKE[self.scheduler].discard(slots.index)
        while True:
            free = [other.free for other in self.scheduler.replicas]
            stalled, slots.stalled = slots.stalled, False
            free[slots.index], slots.stalled = slots.free, stalled
            found = self.scheduler.next_for(slots)
            if found is None:
                break
            assert free[slots.index] == max(free), "another replica is less loaded"
            task, instance = found
            assert instance == slots.instance
            first = self.waiting[INTERACTIVE] or self.waiting[BATCH]
            assert task is first.pop(0), "not the first in line"
            self.running[slots.index].append(task)
            assert len(self.running[slots.index]) <= slots.total

    @rule(data=st.data())
    def worker_turn(self, data: st.DataObject) -> None:
        self._turn(data.draw(st.sampled_from(self.scheduler.replicas)))

    @rule()
    def all_workers_turn(self) -> None:
        for slots in self.scheduler.replicas:
            self._turn(slots)
        while AWAKE[self.scheduler]:
            self._turn(self.scheduler.replicas[min(AWAKE[self.scheduler])])
        assert not (self.all_waiting and self.free_slots), "a task waits beside an idle slot"

    @rule(data=st.data())
    def replica_goes_and_comes(self, data: st.DataObject) -> None:
        slots = data.draw(st.sampled_from(self.scheduler.replicas))
        if slots.ready:  # its worker ends what it runs
            self.scheduler.set_ready(slots, ready=False)
            for task in self.running[slots.index]:
                self.scheduler.release(slots, task, completed=False)
            self.gone += self.running[slots.index]
            self.running[slots.index] = []
            assert self.scheduler.next_for(slots) is None
        else:
            self.scheduler.set_ready(slots, ready=True)

    @rule(data=st.data())
    def stall(self, data: st.DataObject) -> None:
        slots = data.draw(st.sampled_from(self.scheduler.replicas))
        assert set(self.scheduler.note_stall(slots)) == set(slots.running)
        assert not slots.free

    @rule(data=st.data())
    def memory_changes(self, data: st.DataObject) -> None:
        self.scheduler.note_free_bytes(
            data.draw(st.sampled_from(self.scheduler.replicas)), data.draw(st.integers(0, 3))
        )

    @rule(seconds=st.floats(0, 10))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule()
    def clear(self) -> None:
        assert self.scheduler.clear() == self.all_waiting
        self.gone += self.all_waiting
        self.waiting = {INTERACTIVE: [], BATCH: []}

    @invariant()
    def whoever_could_start_a_waiting_task_is_awake_or_will_be_woken(self) -> None:
        if hasattr(self, "scheduler") and self.all_waiting and self.free_slots:
            assert any(self.scheduler.replicas[index].free for index in AWAKE[self.scheduler])

    @invariant()
    def nothing_is_lost_or_doubled(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        scheduler = self.scheduler
        scheduler.check_integrity()
        assert min(self.pauses, default=1) > 0
        assert scheduler.waiting() == self.all_waiting
        assert [set(slots.running) for slots in scheduler.replicas] == [{t.id for t in tasks} for tasks in self.running]
        assert scheduler.depth() == {priority: len(self.waiting[priority]) for priority in Priority}
        left = sum(sum(slots.enqueued.values()) for slots in scheduler.replicas) + sum(scheduler.dropped.values())
        assert self.accepted == left + len(self.all_waiting)
        assert self.accepted == len(self.all_waiting) + sum(map(len, self.running)) + len(self.gone)


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=600, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


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
            task = make_task(choose.choice(list(Priority)))
            with contextlib.suppress(AdmissionReject), scheduler.reservation(task.priority):
                scheduler.submit(task)
                mine.append(task)
            if mine and choose.random() < 0.3 and scheduler.cancel(task := choose.choice(mine)) is Found.WAITING:
                cancelled.append(task)
        accepted.extend(mine)

    def work(slots: ReplicaSlots[str], seed: int) -> None:
        choose = random.Random(seed)
        running: list[Task] = []
        while not done.is_set() or running or scheduler.waiting():
            while (found := take(scheduler, slots)) is not None:
                running.append(found)
                assert len(running) <= slots.total
            if running:
                task = running.pop(choose.randrange(len(running)))
                scheduler.release(slots, task, completed=True)
                ended.append(task)

    def flicker() -> None:
        while not done.is_set():
            scheduler.note_stall(scheduler.replicas[0])
            scheduler.check_integrity()
            scheduler.depth()

    senders = [threading.Thread(target=guarded, args=(lambda n=n: send(n),)) for n in range(4)]
    others = [threading.Thread(target=guarded, args=(lambda s=s: work(s, s.index),)) for s in scheduler.replicas]
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
    assert sum(sum(slots.enqueued.values()) for slots in scheduler.replicas) == len(ended)
    assert sum(scheduler.dropped.values()) == len(cancelled)
    scheduler.check_integrity()
