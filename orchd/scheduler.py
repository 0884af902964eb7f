"""One pool's admission and order: a bounded queue, which replica starts what, and Reject when full.

Guarantees:
- every interactive task is handed out before any waiting batch task, in order of submission inside each priority;
- a task is in exactly one place: the heap, the hands of one replica, or gone;
- at most ``capacity`` tasks wait; one that was accepted is never dropped to make room;
- no task waits while a ready replica has a free slot.

Any thread may call anything: each method is one short critical section under one lock and calls nothing outside.
"""

from __future__ import annotations

import array
import enum
import math
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from orchd.drain import DrainRate, Promises, Schedule
from orchd.errors import AdmissionReject
from orchd.placement import Load, least_loaded
from orchd.schemas import Accepted, Priority
from orchd.seat import Seat
from orchd.task_queue import TaskQueue
from orchd.tasks import Task


class Place(enum.Enum):
    """What `Scheduler.cancel` found."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    GONE = enum.auto()


class Scheduler:
    """See the module.

    Args:
        capacity: Most tasks that may wait.
        seats: The pool's replicas.
        clock: Monotonic seconds.
    """

    def __init__(self, capacity: int, seats: list[Seat], *, clock: Callable[[], float]) -> None:
        self.capacity = capacity
        self.seats = seats
        self._clock = clock
        self._lock = threading.Lock()
        self._queue = TaskQueue()
        self._reserved = 0
        self._drain = DrainRate()
        self._promises = Promises()
        self.dropped: Counter[Priority] = Counter()
        """Tasks that left the queue without a replica: cancelled or failed there."""

    # --- coming in -------------------------------------------------------------------------------------------------

    def reserve(self) -> None:
        """Take a place before the work of preparing a task is done; `submit` or `release_place` gives it back.

        Raises:
            AdmissionReject: The queue is full; carries the pause after which a place should be free.
        """
        with self._lock:
            self._refuse_if_full()
            self._promises.redeem(self._clock())
            self._reserved += 1

    @property
    def full(self) -> bool:
        """Whether `check_room` would raise. Promises nothing."""
        with self._lock:
            return not self._has_room(self._free_places())

    def check_room(self) -> None:
        """Raise `AdmissionReject` as `reserve` would, but take no place."""
        with self._lock:
            self._refuse_if_full()

    def release_place(self) -> None:
        """Give a reserved place back: the task was refused for another reason."""
        with self._lock:
            self._reserved -= 1

    def submit(self, task: Task) -> tuple[Accepted, int | None]:
        """Queue a task for which `reserve` took a place.

        Returns:
            The answer for its sender, which is also noted in the task, and the index of the seat whose worker should be
            woken, if it was placed at once.
        """
        with self._lock:
            self._reserved -= 1
            schedule = self._schedule()
            ahead = max(0, self._queue.ahead_of(task.priority) - self._claims())
            start_s = schedule.free_at(ahead) - schedule.now
            task.accepted = Accepted(
                task_id=task.id,
                queue_position=ahead,
                predicted_start_ms=math.ceil(start_s * 1000),
                backoff_ms=self._pause_ms(schedule),
            )
            self._queue.push(task)
            return task.accepted, self._place()

    # --- going out -------------------------------------------------------------------------------------------------

    def next_for(self, seat: Seat) -> tuple[Task, Any] | None:
        """The task a replica's worker should start now, and the host to start it on.

        It is the first of all that wait, whoever it was placed for. None if the replica has no slot to fill, or all
        that wait have one elsewhere.
        """
        with self._lock:
            seat.stalled = False
            if not seat.ready:
                return None
            if seat.claims:
                seat.claims -= 1
            elif not seat.free or len(self._queue) <= self._claims():
                return None
            task = self._queue.pop()
            seat.running[task.id] = self._clock()
            seat.enqueued[task.priority] += 1
            return task, seat.host

    def release(self, seat: Seat, task: Task, *, completed: bool) -> None:
        """A task's slot is free again. ``completed`` ones teach the drain rate."""
        with self._lock:
            started = seat.running.pop(task.id)
            if completed:
                self._drain.observe(self._clock() - started)

    def cancel(self, task: Task) -> Place:
        """Take a task out if it waits; says where it is otherwise."""
        with self._lock:
            if self._queue.get(task.id) is not None:
                self._queue.remove(task.id)
                self._note_dropped(task)
                return Place.WAITING
            if any(task.id in seat.running for seat in self.seats):
                return Place.RUNNING
            return Place.GONE

    def waiting(self) -> list[Task]:
        """Every waiting task, in no order."""
        with self._lock:
            return list(self._queue)

    def drain_waiting(self) -> list[Task]:
        """Take every waiting task out, in order."""
        with self._lock:
            tasks = self._queue.clear()
            for task in tasks:
                self._note_dropped(task)
            return tasks

    # --- replicas --------------------------------------------------------------------------------------------------

    def set_ready(self, seat: Seat, *, ready: bool) -> None:
        """A replica came or went; tasks that were placed on one that went are the next to be placed.

        Its caller wakes the workers of the other replicas: there may be something for them now.
        """
        with self._lock:
            seat.ready = ready
            seat.claims = 0
            self._place_all()

    def note_free_bytes(self, seat: Seat, free_bytes: int) -> None:
        """Free memory of a replica's device, as measured last; counts from the next placement on."""
        with self._lock:
            seat.free_bytes = free_bytes

    def note_stall(self, seat: Seat) -> list[str]:
        """A replica's worker hangs: tasks placed there are placed elsewhere, until it moves again.

        Its caller wakes the workers of the other replicas.

        Returns:
            The ids of the tasks that hang with it.
        """
        with self._lock:
            seat.stalled = True
            seat.claims = 0
            self._place_all()
            return list(seat.running)

    def switch(self, hosts: Sequence[Any], tokens: Mapping[str, array.array[int]]) -> None:
        """Give every replica another host at once, None for none, and waiting tasks the prompts that go with it."""
        with self._lock:
            for task_id, prompt in tokens.items():
                if (task := self._queue.get(task_id)) is not None:
                    task.tokens = prompt
            for seat, host in zip(self.seats, hosts, strict=True):
                self._seat(seat, host)
            self._place_all()

    def bring_back(self, seat: Seat, host: Any) -> None:
        """Give one replica a host again."""
        with self._lock:
            self._seat(seat, host)
            self._place_all()

    @property
    def any_ready(self) -> bool:
        """Whether some replica can start tasks."""
        return any(seat.serving for seat in self.seats)

    # --- looking ---------------------------------------------------------------------------------------------------

    def depth(self) -> dict[Priority, int]:
        """Waiting tasks by priority."""
        with self._lock:
            return dict(self._queue.depth)

    def check_integrity(self) -> None:
        """Assert what the module promises; for tests."""
        with self._lock:
            self._queue.check_integrity()
            running = [task_id for seat in self.seats for task_id in seat.running]
            assert len(running) == len(set(running))
            assert not any(self._queue.get(task_id) for task_id in running)
            assert self._claims() <= len(self._queue) <= self.capacity + sum(seat.slots for seat in self.seats)
            assert self._reserved >= 0
            for seat in self.seats:
                assert seat.claims >= 0
                assert seat.busy <= seat.slots
                assert seat.serving or not seat.claims

    # --- inside the lock -------------------------------------------------------------------------------------------

    def _claims(self) -> int:
        return sum(seat.claims for seat in self.seats)

    def _place(self) -> int | None:
        """Give one waiting task that has no slot yet a slot of the least-loaded replica; returns its index."""
        if len(self._queue) <= self._claims():
            return None
        index = least_loaded(Load(seat.index, seat.free, seat.free_bytes) for seat in self.seats)
        if index is not None:
            self.seats[index].claims += 1
        return index

    def _place_all(self) -> None:
        while self._place() is not None:
            pass

    def _seat(self, seat: Seat, host: Any) -> None:
        seat.host = host
        seat.ready = host is not None
        seat.claims = 0

    def _schedule(self) -> Schedule:
        now = self._clock()
        started: list[float] = []
        free_slots = 0
        for seat in self.seats:
            if seat.serving:
                started += seat.running.values()
                started += [now] * seat.claims
                free_slots += seat.free
        return self._drain.schedule(now, started, free_slots)

    def _free_places(self) -> int:
        places = self.capacity - len(self._queue) - self._reserved
        for seat in self.seats:
            places += seat.free + seat.claims
        return places

    def _has_room(self, free_places: int) -> bool:
        if free_places <= 0:
            return False
        if sum(seat.free for seat in self.seats) > self._reserved or len(self._queue) <= self._claims():
            return True  # a slot is idle or about to be: nobody is made to wait for a promise
        return self._promises.admits(self._schedule(), free_places)

    def _refuse_if_full(self) -> None:
        free_places = self._free_places()
        if self._has_room(free_places):
            return
        pause_s = self._promises.make(self._schedule(), free_places)
        raise AdmissionReject(
            f"the queue is full ({self.capacity} tasks waiting); try again after the pause in X-Backoff-Ms",
            retry_after_s=pause_s,
        )

    def _pause_ms(self, schedule: Schedule) -> int:
        over = len(self._queue) + 1 - max(1, self.capacity // 2)
        if over <= 0:
            return 0
        return max(1, math.ceil((schedule.free_at(over - 1) - schedule.now) * 1000))

    def _note_dropped(self, task: Task) -> None:
        """A task left the queue without a replica: a slot that was kept for one is free again if too few wait now."""
        self.dropped[task.priority] += 1
        if self._claims() > len(self._queue):
            max(self.seats, key=lambda seat: (seat.claims > 0, seat.busy, seat.index)).claims -= 1
