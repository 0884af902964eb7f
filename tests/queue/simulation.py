"""Clients, a queue and workers in simulated time: the real scheduler, everything else as plain as possible."""

from __future__ import annotations

import array
import functools
import heapq
import itertools
import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engines.api import Prompt
from orchd.errors import AdmissionReject
from orchd.queue.scheduler import Scheduler
from orchd.queue.slots import ReplicaSlots
from orchd.queue.tasks import Task
from orchd.schemas import Priority, TaskRequest
from testkit.builders import Clock, pause_of

Then = Callable[[], None]

ROUND_TRIP_S = (0.0005, 0.004)  # of a client's retry
TOKEN_S = 0.01
PROMPT_S = 0.05


@dataclass(frozen=True)
class Job:
    """What a client wants: it will be ended after ``tokens``, which only the client's model knows."""

    tokens: int
    max_tokens: int


Jobs = Callable[[random.Random, float], Job]
"""The next job, where such a share of the simulation has passed."""


class Simulation:
    """One pool under load.

    Args:
        slots: Of each replica.
        capacity: Of the queue.
        jobs: What clients want.
        duration_s: How long `run` runs; its first twentieth is not measured.
        nameless: Whether senders give their tasks no id.
    """

    def __init__(
        self,
        *,
        slots: Sequence[int],
        capacity: int,
        jobs: Jobs,
        duration_s: float,
        nameless: bool = False,
        seed: int = 0,
    ) -> None:
        self._awake: set[int] = set()
        self.clock = Clock()
        self.random = random.Random(seed)
        self.replicas = [ReplicaSlots(index, n, ready=True, instance="model") for index, n in enumerate(slots)]
        for replica in self.replicas:
            replica.wake = functools.partial(self._awake.add, replica.index)
        self.scheduler = Scheduler(capacity, self.replicas, clock=self.clock)
        self.slots = sum(slots)
        self.first_retries: list[bool] = []
        self.refusals = 0
        self.admissions = 0
        self.prediction_errors: list[float] = []
        self.pauses: list[float] = []
        self.ended = 0
        self.idle_beside_refused_s = 0.0
        self._jobs = jobs
        self._nameless = nameless
        self._began = self.clock.now
        self._duration_s = duration_s
        self._warm = self.clock.now + duration_s / 20
        self._events: list[tuple[float, int, Then]] = []
        self._numbers = itertools.count()
        self._lengths: dict[str, tuple[Job, float, Then]] = {}
        self._paused = 0  # senders that were told to wait

    # --- what came out ---------------------------------------------------------------------------------------------

    @property
    def measuring(self) -> bool:
        return self.clock.now > self._warm

    @property
    def kept(self) -> float:
        """Share of refused senders that were admitted on their first retry."""
        assert len(self.first_retries) >= 50
        return statistics.mean(self.first_retries)

    @property
    def refused_per_admitted(self) -> float:
        return self.refusals / max(1, self.admissions)

    @property
    def prediction_error(self) -> float:
        """Median of |predicted start - start| over start, for tasks that waited."""
        return statistics.median(self.prediction_errors)

    @property
    def idle(self) -> float:
        """Share of the slots' time in which they were idle while somebody had been told to wait."""
        return self.idle_beside_refused_s / (self.clock.now - self._warm) / self.slots

    # --- time ------------------------------------------------------------------------------------------------------

    def after(self, pause_s: float, then: Then) -> None:
        heapq.heappush(self._events, (self.clock.now + pause_s, next(self._numbers), then))

    def run(self) -> None:
        until = self._began + self._duration_s
        while self._events and self._events[0][0] <= until:
            when, _, then = heapq.heappop(self._events)
            self._pass(when)
            then()
            self._fill()
            assert not self.scheduler.waiting() or not any(slots.free for slots in self.replicas), "an idle slot"
        self._pass(until)

    def _pass(self, when: float) -> None:
        if self._paused:
            free = sum(slots.free for slots in self.replicas)
            self.idle_beside_refused_s += free * max(0.0, when - max(self.clock.now, self._warm))
        self.clock.now = when
        for slots in self.replicas:
            for running in slots.running.values():
                decoding_s = when - running.since - PROMPT_S
                if decoding_s >= 0:
                    running.task.first_token_at = running.since + PROMPT_S
                    running.task.tokens_out = 1 + int(decoding_s / TOKEN_S + 1e-9)

    # --- clients ---------------------------------------------------------------------------------------------------

    def send(self, then: Then, *, retries: int | None = None) -> None:
        """Submit a job, and if refused come back after exactly the pause, so many times (None: for ever)."""
        job = self._jobs(self.random, (self.clock.now - self._began) / self._duration_s)
        self._knock(job, then, retries, None if self._nameless else f"sender {next(self._numbers)}", 0)

    def _knock(self, job: Job, then: Then, retries: int | None, name: str | None, attempt: int) -> None:
        self._paused -= attempt > 0
        request = TaskRequest(prompt="x", max_tokens=job.max_tokens)
        task = Task(f"task {next(self._numbers)}", request, "default", Prompt(array.array("i", [0] * 10)))
        try:
            with self.scheduler.reservation(Priority.INTERACTIVE, name):
                self._lengths[task.id] = job, self.clock.now, then
                self.scheduler.submit(task)
        except AdmissionReject as refusal:
            if self.measuring:
                self.refusals += 1
                self.pauses.append(pause_of(refusal))
                if attempt == 1:
                    self.first_retries.append(False)
            if retries is None or attempt < retries:
                self._paused += 1
                pause_s = math.ceil(pause_of(refusal) * 1000) / 1000 + self.random.uniform(*ROUND_TRIP_S)
                self.after(pause_s, lambda: self._knock(job, then, retries, name, attempt + 1))
            return
        if self.measuring:
            self.admissions += 1
            if attempt == 1:
                self.first_retries.append(True)

    def closed_loop(self, clients: int, *, think_s: float) -> None:
        """Clients that each send a task, wait for its end, think, and send the next."""

        def send() -> None:
            self.send(lambda: self.after(self.random.expovariate(1 / think_s), send))

        for _ in range(clients):
            self.after(self.random.random(), send)

    def bursts(self, size: int, *, within_s: float, every_s: float, retries: int | None = None) -> None:
        """So many senders at nearly the same time, again and again."""

        def burst() -> None:
            self.after(every_s, burst)
            for _ in range(size):
                self.after(self.random.uniform(0, within_s), lambda: self.send(nothing, retries=retries))

        self.after(0, burst)

    def poisson(self, per_s: float, *, retries: int | None = None) -> None:
        """Senders that know nothing of each other."""

        def arrive() -> None:
            self.after(self.random.expovariate(per_s), arrive)
            self.send(nothing, retries=retries)

        self.after(0, arrive)

    # --- workers ---------------------------------------------------------------------------------------------------

    def _fill(self) -> None:
        while self._awake:
            slots = self.replicas[self._awake.pop()]
            while (found := self.scheduler.next_for(slots)) is not None:
                task = found[0]
                job, submitted, _ = self._lengths[task.id]
                waited = self.clock.now - submitted
                assert task.accepted is not None
                if waited > 0 and self.measuring:
                    self.prediction_errors.append(abs(task.accepted.predicted_start_ms / 1000 - waited) / waited)
                self.after(PROMPT_S + (job.tokens - 1) * TOKEN_S, functools.partial(self._end, slots, task))

    def _end(self, slots: ReplicaSlots[str], task: Task) -> None:
        job, _, then = self._lengths.pop(task.id)
        task.tokens_out = job.tokens
        self.scheduler.release(slots, task, completed=True)
        self.ended += self.measuring
        self._awake.add(slots.index)
        self._fill()
        then()


def nothing() -> None:
    pass
