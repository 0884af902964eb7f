"""Clients, a queue and workers in simulated time: the real scheduler, everything else as plain as possible."""

from __future__ import annotations

import functools
import heapq
import itertools
import math
import random
import statistics
from collections.abc import Callable, Sequence

from orchd.errors import AdmissionReject
from orchd.scheduler import Scheduler
from orchd.seat import Seat
from orchd.tasks import Task
from tests.core.builders import Clock, make_task, pause_of

Then = Callable[[], None]

ROUND_TRIP_S = (0.0005, 0.004)  # of a client's retry


class Simulation:
    """One pool under load.

    Args:
        slots: Of each replica.
        capacity: Of the queue.
        spread: Standard deviation of service times over their mean, which is 1 s; they are log-normal.
        warm_s: Nothing is measured before.
    """

    def __init__(self, *, slots: Sequence[int], capacity: int, spread: float, warm_s: float = 60) -> None:
        self.clock = Clock()
        self.random = random.Random(0)
        self.seats = [Seat(index, count, ready=True) for index, count in enumerate(slots)]
        self.scheduler = Scheduler(capacity, self.seats, clock=self.clock)
        self.slots = sum(slots)
        self.first_retries: list[bool] = []
        self.prediction_errors: list[float] = []
        self.ended = 0
        self._spread = spread
        self._warm = self.clock.now + warm_s
        self._events: list[tuple[float, int, Then]] = []
        self._numbers = itertools.count()
        self._submitted: dict[str, tuple[float, Then]] = {}
        self._busy_s = 0.0

    # --- what came out ---------------------------------------------------------------------------------------------

    @property
    def measuring(self) -> bool:
        return self.clock.now > self._warm

    @property
    def kept(self) -> float:
        """Share of clients admitted on their first retry."""
        assert len(self.first_retries) >= 50
        return statistics.mean(self.first_retries)

    @property
    def prediction_error(self) -> float:
        """Median of |predicted start - start| over start, for tasks that waited."""
        return statistics.median(self.prediction_errors)

    @property
    def utilisation(self) -> float:
        return self._busy_s / (self.clock.now - self._warm) / self.slots

    # --- time ------------------------------------------------------------------------------------------------------

    def after(self, pause_s: float, then: Then) -> None:
        heapq.heappush(self._events, (self.clock.now + pause_s, next(self._numbers), then))

    def run(self, seconds: float) -> None:
        until = self.clock.now + seconds
        while self._events and self._events[0][0] <= until:
            when, _, then = heapq.heappop(self._events)
            self._pass(when)
            then()
            assert not self.scheduler.waiting() or not any(seat.free for seat in self.seats), "an idle slot"
        self._pass(until)

    def _pass(self, when: float) -> None:
        busy = sum(len(seat.running) for seat in self.seats)
        self._busy_s += busy * max(0.0, when - max(self.clock.now, self._warm))
        self.clock.now = when

    # --- clients ---------------------------------------------------------------------------------------------------

    def knock(self, then: Then, *, retries: int | None = None, attempt: int = 0) -> bool:
        """Submit, and if refused come back after exactly the pause, so many times (None: for ever)."""
        try:
            self.scheduler.reserve()
        except AdmissionReject as refusal:
            if attempt == 1 and self.measuring:
                self.first_retries.append(False)
            if retries is None or attempt < retries:
                pause_s = math.ceil(pause_of(refusal) * 1000) / 1000 + self.random.uniform(*ROUND_TRIP_S)
                self.after(pause_s, lambda: void(self.knock(then, retries=retries, attempt=attempt + 1)))
            return False
        if attempt == 1 and self.measuring:
            self.first_retries.append(True)
        task = make_task()
        self._submitted[task.id] = self.clock.now, then
        self.scheduler.submit(task)
        self._fill()
        return True

    def closed_loop(self, clients: int, *, think_s: float = 0.01) -> None:
        """Clients that each send a task, wait for its end, think, and send the next."""

        def send() -> None:
            self.knock(lambda: self.after(self.random.expovariate(1 / think_s), send))

        for _ in range(clients):
            self.after(self.random.random(), send)

    def open_loop(self, load: float, *, retries: int | None) -> None:
        """Poisson arrivals at so many times the service rate."""

        def arrive() -> None:
            self.after(self.random.expovariate(load * self.slots), arrive)
            self.knock(nothing, retries=retries)

        self.after(0, arrive)

    # --- workers ---------------------------------------------------------------------------------------------------

    def _fill(self) -> None:
        for seat in self.seats:
            while (found := self.scheduler.next_for(seat)) is not None:
                task = found[0]
                waited = self.clock.now - self._submitted[task.id][0]
                assert task.accepted is not None
                if waited > 0 and self.measuring:
                    self.prediction_errors.append(abs(task.accepted.predicted_start_ms / 1000 - waited) / waited)
                self.after(self._service_s(), functools.partial(self._end, seat, task))

    def _end(self, seat: Seat, task: Task) -> None:
        self.scheduler.release(seat, task, completed=True)
        self.ended += self.measuring
        then = self._submitted.pop(task.id)[1]
        self._fill()
        then()

    def _service_s(self) -> float:
        sigma = math.sqrt(math.log(1 + self._spread**2))
        return self.random.lognormvariate(-sigma * sigma / 2, sigma)


def nothing() -> None:
    pass


def void(_: object) -> None:
    pass
