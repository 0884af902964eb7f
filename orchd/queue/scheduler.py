"""One pool's admission and order: a bounded queue, which replica starts what, and Reject when full.

Guarantees:
- every interactive task is handed out before any waiting batch task, in order of submission inside each priority;
- a task waits in the queue, is with exactly one replica, or is gone;
- at most ``capacity`` tasks wait while all slots are full, none is refused below that, and no accepted task is dropped;
- a task starts on the replica that is least loaded then, and none waits while a ready replica has a free slot.

How a place is taken: a task is prepared (tokenised) before it is queued, so its place is reserved before that. With a
capacity of 2, one slot, and one task running:
- A waits, and B and C arrive together. B reserves the last place, and C is refused while B is still being tokenised.
  Without the reservation both would see one place, and three tasks would wait.
- The slot comes free, and its worker has not taken A yet. A counts as started, so D is accepted. Otherwise D would be
  refused while a slot is free.

How a slot is filled: `next_for` hands the first task only to the least-loaded replica. Any other replica that asks
gets nothing, and the least-loaded one is woken. Every change of which replica that is wakes it too, so no task waits
for a worker that sleeps.

Any thread may call anything: each method is one short critical section under one lock; workers are woken after it.
"""

from __future__ import annotations

import contextlib
import enum
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Generic, TypeVar

from orchd.errors import AdmissionReject
from orchd.models.prepared import Prepared
from orchd.queue.backoff import Backoff
from orchd.queue.forecast import Forecast, Plan, Running
from orchd.queue.placement import Load, least_loaded
from orchd.queue.slots import ReplicaSlots
from orchd.queue.task_queue import TaskQueue
from orchd.queue.tasks import Task
from orchd.schemas import Accepted, Priority

PLAN_S = 0.1
"""How long a plan stays valid while nothing but the time has changed."""


T = TypeVar("T")


class Found(enum.Enum):
    """What `Scheduler.cancel` found."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    GONE = enum.auto()


class Scheduler(Generic[T]):
    """The queue of one pool and the slots of its replicas; ``T`` is what a replica's worker runs tasks on.

    Args:
        capacity: Most tasks that may wait.
        replicas: The slots of each replica.
        clock: Monotonic seconds.
    """

    def __init__(self, capacity: int, replicas: list[ReplicaSlots[T]], *, clock: Callable[[], float]) -> None:
        self.capacity = capacity
        self.replicas = replicas
        self._clock = clock
        self._lock = threading.Lock()
        self._queue = TaskQueue()
        self._reserved = 0
        self._forecast = Forecast()
        self._plan: Plan | None = None  # None once a task has started, ended or left
        self._backoffs = {priority: Backoff(capacity + sum(slots.total for slots in replicas)) for priority in Priority}
        self.dropped: Counter[Priority] = Counter()
        """Tasks that left the queue without a replica: cancelled or failed there."""

    # --- coming in -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def reservation(self, priority: Priority, task_id: str | None = None) -> Iterator[None]:
        """A place in the queue for as long as a task is being prepared; `submit` it inside.

        Args:
            priority: Of the task that wants a place.
            task_id: What its sender calls it, if it gave it a name.

        Raises:
            AdmissionReject: The queue is full; carries the time after which a place is expected.
        """
        with self._lock:
            now = self._clock()
            backoff, places = self._backoffs[priority], self._places()
            backoff.note_sender(now, task_id)
            if places <= 0:
                pause_s = backoff.pause_s(self._current_plan(now), -places, task_id)
                raise AdmissionReject(
                    f"the queue is full ({self.capacity} tasks); try again in {pause_s:.1f} s", retry_after_s=pause_s
                )
            self._reserved += 1
        try:
            yield
        finally:
            with self._lock:
                self._reserved -= 1

    def submit(self, task: Task) -> Accepted:
        """Queue a task, inside its `reservation`; returns the answer for its sender, also noted in the task."""
        with self._lock:
            now = self._clock()
            plan = self._current_plan(now)
            ahead = self._queue.ahead_of(task.priority)
            start = plan.start_at(ahead)
            self._queue.push(task)
            if plan.planned == len(self._queue) - 1:
                self._forecast.add_to(plan, task)
            answer = task.accepted = Accepted(
                task_id=task.id,
                queue_position=max(0, ahead - self._free_slots()),
                predicted_start_ms=math.ceil(max(0.0, start - now) * 1000),
                backoff_ms=self._pause_ms(plan, now),
            )
            slots = self._next_slots()
        _wake(slots)
        return answer

    # --- going out -------------------------------------------------------------------------------------------------

    def next_for(self, slots: ReplicaSlots[T]) -> tuple[Task, T] | None:
        """The task a replica's worker should start now, and the instance to start it on.

        None if nobody waits, the replica has no slot to fill, or another one is less loaded.
        """
        with self._lock:
            slots.stalled = False
            if not self._queue or not slots.free or slots.instance is None:
                return None
            found, chosen = None, self._next_slots()
            if chosen is slots:
                task = self._queue.pop()
                slots.running[task.id] = Running.of(task, self._clock())
                slots.enqueued[task.priority] += 1
                self._plan = None
                found, chosen = (task, slots.instance), self._next_slots()
        if chosen is not slots:
            _wake(chosen)
        return found

    def release(self, slots: ReplicaSlots[T], task: Task, *, completed: bool) -> None:
        """A task's slot is free again. From ``completed`` ones it is learnt how long tasks take."""
        with self._lock:
            full = not self._free_slots()
            running = slots.running.pop(task.id)
            self._plan = None
            if completed:
                self._forecast.observe(running, self._clock(), full=full)

    def cancel(self, task: Task) -> Found:
        """Take a task out if it waits; says where it is otherwise."""
        with self._lock:
            if self._queue.get(task.id) is not None:
                self._queue.remove(task)
                self._note_dropped(task)
                return Found.WAITING
            if any(task.id in slots.running for slots in self.replicas):
                return Found.RUNNING
            return Found.GONE

    def waiting(self) -> list[Task]:
        """Every waiting task, in order."""
        with self._lock:
            return list(self._queue)

    def clear(self) -> list[Task]:
        """Take every waiting task out, in order."""
        with self._lock:
            tasks = self._queue.clear()
            for task in tasks:
                self._note_dropped(task)
            return tasks

    # --- replicas --------------------------------------------------------------------------------------------------

    def set_ready(self, slots: ReplicaSlots[T], *, ready: bool) -> None:
        """A replica came or went."""
        with self._lock:
            slots.ready = ready
            chosen = self._replicas_changed()
        _wake(chosen)

    def note_free_bytes(self, slots: ReplicaSlots[T], free_bytes: int) -> None:
        """Free memory of a replica's device, as measured last; counts from the next placement on."""
        with self._lock:
            slots.free_bytes = free_bytes

    def note_stall(self, slots: ReplicaSlots[T]) -> list[str]:
        """A replica's worker hangs: it gets nothing until it moves again.

        Returns:
            The ids of the tasks that hang with it.
        """
        with self._lock:
            slots.stalled = True
            hanging = list(slots.running)
            chosen = self._replicas_changed()
        _wake(chosen)
        return hanging

    def switch(self, instances: Sequence[T | None], prompts: Mapping[str, Prepared]) -> None:
        """Give every replica another instance at once, None for none, and waiting tasks the prompts that go with it."""
        with self._lock:
            for task_id, (prompt, grammar) in prompts.items():
                if (task := self._queue.get(task_id)) is not None:
                    task.prompt, task.grammar = prompt, grammar
            for slots, instance in zip(self.replicas, instances, strict=True):
                slots.instance, slots.ready = instance, instance is not None
            chosen = self._replicas_changed()
        _wake(chosen)

    def bring_back(self, slots: ReplicaSlots[T], instance: T) -> None:
        """Give one replica an instance again."""
        with self._lock:
            slots.instance, slots.ready = instance, True
            chosen = self._replicas_changed()
        _wake(chosen)

    @property
    def any_ready(self) -> bool:
        """Whether some replica can start tasks."""
        return any(slots.serving for slots in self.replicas)

    # --- looking ---------------------------------------------------------------------------------------------------

    def depth(self) -> dict[Priority, int]:
        """Waiting tasks by priority."""
        with self._lock:
            return self._queue.depth

    def check_integrity(self) -> None:
        """Assert what the module promises; for tests."""
        with self._lock:
            self._queue.check_integrity()
            running = [task_id for slots in self.replicas for task_id in slots.running]
            assert len(running) == len(set(running))
            assert not any(self._queue.get(task_id) for task_id in running)
            assert len(self._queue) <= self.capacity + sum(slots.total for slots in self.replicas)
            assert self._reserved >= 0
            for slots in self.replicas:
                assert slots.busy <= slots.total

    # --- inside the lock -------------------------------------------------------------------------------------------

    def _next_slots(self) -> ReplicaSlots[T] | None:
        """The replica that the first waiting task should start on; None if none waits or no slot is free."""
        if not self._queue:
            return None
        index = least_loaded(Load(slots.index, slots.free, slots.free_bytes) for slots in self.replicas)
        return None if index is None else self.replicas[index]

    def _replicas_changed(self) -> ReplicaSlots[T] | None:
        self._plan = None
        return self._next_slots()

    def _free_slots(self) -> int:
        return sum(slots.free for slots in self.replicas)

    def _places(self) -> int:
        """How many more tasks fit; a waiting task for which there is a free slot counts as started (see the module)."""
        return self.capacity + self._free_slots() - len(self._queue) - self._reserved

    def _current_plan(self, now: float) -> Plan:
        if self._plan is None or now > self._plan.now + PLAN_S:
            serving = [slots for slots in self.replicas if slots.serving]
            running = [one for slots in serving for one in slots.running.values()]
            self._plan = self._forecast.plan(now, running, self._free_slots(), self._queue)
        return self._plan

    def _pause_ms(self, plan: Plan, now: float) -> int:
        """Until the queue is under half full, if nobody else comes."""
        free_slots = self._free_slots()
        over = len(self._queue) - free_slots + 1 - max(1, self.capacity // 2)
        if over <= 0:
            return 0
        return max(1, math.ceil((plan.start_at(free_slots + over - 1) - now) * 1000))

    def _note_dropped(self, task: Task) -> None:
        self._plan = None
        self.dropped[task.priority] += 1


def _wake(slots: ReplicaSlots[T] | None) -> None:
    if slots is not None:
        slots.wake()
