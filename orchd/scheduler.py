"""One pool's admission and order: a bounded heap, two priorities, first in first out inside each, and Reject when full.

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
import heapq
import itertools
import math
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from orchd.drain import DrainRate, Promises, Schedule
from orchd.errors import AdmissionReject
from orchd.placement import Load, least_loaded
from orchd.schemas import Accepted, Priority
from orchd.tasks import Task

_RANK = {Priority.INTERACTIVE: 0, Priority.BATCH: 1}


class Place(enum.Enum):
    """What `Scheduler.cancel` found."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    GONE = enum.auto()


@dataclass(eq=False)
class Seat:
    """A replica as its scheduler sees it. Changed under the scheduler's lock only.

    Attributes:
        index: Position among the pool's replicas.
        slots: Tasks it can run at once.
        ready: It has the model and its worker was not given up.
        stalled: Its worker has not moved for too long; it gets nothing until it asks for something.
        free_bytes: Free memory on its device, for placement.
        claims: Waiting tasks that placement gave one of its slots; its worker takes them at its next step.
        host: What its worker runs new tasks on; opaque here, but changed and handed out under the lock.
        running: Tasks its worker took, with the time.
        enqueued: Tasks it ever took, by priority.
    """

    index: int
    slots: int
    ready: bool = False
    stalled: bool = False
    free_bytes: int = 0
    claims: int = 0
    host: Any = None
    running: dict[str, float] = field(default_factory=dict)
    enqueued: Counter[Priority] = field(default_factory=Counter)

    @property
    def busy(self) -> int:
        """Slots in use or given away."""
        return len(self.running) + self.claims

    @property
    def free(self) -> int:
        """Slots that nobody has and that could be filled now."""
        return max(0, self.slots - self.busy) if self.ready and not self.stalled else 0


@dataclass(order=True, slots=True)
class _Entry:
    rank: int
    number: int
    task: Task = field(compare=False)
    live: bool = field(default=True, compare=False)


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
        self._heap: list[_Entry] = []
        self._waiting: dict[str, _Entry] = {}
        self._depth: Counter[Priority] = Counter(dict.fromkeys(Priority, 0))
        self._reserved = 0
        self._numbers = itertools.count()
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
            ahead = self._depth[Priority.INTERACTIVE]
            if task.priority is Priority.BATCH:
                ahead += self._depth[Priority.BATCH]
            ahead = max(0, ahead - self._claims())
            start_s = schedule.free_at(ahead) - schedule.now
            task.accepted = Accepted(
                task_id=task.id,
                queue_position=ahead,
                predicted_start_ms=math.ceil(start_s * 1000),
                backoff_ms=self._pause_ms(schedule),
            )
            entry = _Entry(_RANK[task.priority], next(self._numbers), task)
            heapq.heappush(self._heap, entry)
            self._depth[task.priority] += 1
            self._waiting[task.id] = entry
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
            elif not seat.free or len(self._waiting) <= self._claims():
                return None
            entry = self._pop()
            self._leave(entry)
            seat.running[entry.task.id] = self._clock()
            seat.enqueued[entry.task.priority] += 1
            return entry.task, seat.host

    def release(self, seat: Seat, task: Task, *, completed: bool) -> None:
        """A task's slot is free again. ``completed`` ones teach the drain rate."""
        with self._lock:
            started = seat.running.pop(task.id)
            if completed:
                self._drain.observe(self._clock() - started)

    def cancel(self, task: Task) -> Place:
        """Take a waiting task out of the queue; its dead entry leaves the heap later, so this is O(1) amortised."""
        with self._lock:
            entry = self._waiting.get(task.id)
            if entry is not None:
                self._drop(entry)
                return Place.WAITING
            if any(task.id in seat.running for seat in self.seats):
                return Place.RUNNING
            return Place.GONE

    def waiting(self) -> list[Task]:
        """Every waiting task, in no order."""
        with self._lock:
            return [entry.task for entry in self._waiting.values()]

    def drain_waiting(self) -> list[Task]:
        """Take every waiting task out, in order."""
        with self._lock:
            entries = sorted(self._waiting.values())
            for entry in entries:
                self._drop(entry)
            return [entry.task for entry in entries]

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
                if task_id in self._waiting:
                    self._waiting[task_id].task.tokens = prompt
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
        return any(seat.ready and not seat.stalled for seat in self.seats)

    # --- looking ---------------------------------------------------------------------------------------------------

    def depth(self) -> dict[Priority, int]:
        """Waiting tasks by priority."""
        with self._lock:
            return dict(self._depth)

    def check_integrity(self) -> None:
        """Assert what the module promises; for tests."""
        with self._lock:
            live = {entry.task.id for entry in self._heap if entry.live}
            running = [task_id for seat in self.seats for task_id in seat.running]
            assert live == set(self._waiting)
            assert len(running) == len(set(running))
            assert live.isdisjoint(running)
            assert sum(self._depth.values()) == len(live)
            assert self._claims() <= len(live) <= self.capacity + sum(seat.slots for seat in self.seats)
            assert self._reserved >= 0
            for seat in self.seats:
                assert seat.claims >= 0
                assert seat.busy <= seat.slots
                assert (seat.ready and not seat.stalled) or not seat.claims

    # --- inside the lock -------------------------------------------------------------------------------------------

    def _claims(self) -> int:
        return sum(seat.claims for seat in self.seats)

    def _place(self) -> int | None:
        """Give one waiting task that has no slot yet a slot of the least-loaded replica; returns its index."""
        if len(self._waiting) <= self._claims():
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
            if seat.ready and not seat.stalled:
                started += seat.running.values()
                started += [now] * seat.claims
                free_slots += seat.free
        return self._drain.schedule(now, started, free_slots)

    def _free_places(self) -> int:
        places = self.capacity - len(self._waiting) - self._reserved
        for seat in self.seats:
            places += seat.free + seat.claims
        return places

    def _has_room(self, free_places: int) -> bool:
        if free_places <= 0:
            return False
        if sum(seat.free for seat in self.seats) > self._reserved or len(self._waiting) <= self._claims():
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
        over = len(self._waiting) + 1 - max(1, self.capacity // 2)
        if over <= 0:
            return 0
        return max(1, math.ceil((schedule.free_at(over - 1) - schedule.now) * 1000))

    def _pop(self) -> _Entry:
        while True:
            entry = heapq.heappop(self._heap)
            if entry.live:
                return entry

    def _leave(self, entry: _Entry) -> None:
        del self._waiting[entry.task.id]
        self._depth[entry.task.priority] -= 1

    def _drop(self, entry: _Entry) -> None:
        entry.live = False
        self._leave(entry)
        self.dropped[entry.task.priority] += 1
        if self._claims() > len(self._waiting):
            max(self.seats, key=lambda seat: (seat.claims > 0, seat.busy, seat.index)).claims -= 1
        if len(self._heap) > 64 and len(self._heap) > 2 * len(self._waiting):
            self._heap = [kept for kept in self._heap if kept.live]
            heapq.heapify(self._heap)
