"""When slots come free: what is known about each task, made into times. Times are monotonic seconds; no lock, no clock.

A task takes its prompt's tokens at the pool's price, then its output tokens at its own (`orchd.queue.price`). How many
it will write is known only where nothing but ``max_tokens`` can end it. Otherwise earlier tasks tell, those that wrote
more than this one has so far: each says how much more it wrote, and one that its own ``max_tokens`` cut off says that
this one goes on to its own. So what is left of a task is not a number but a list of equally likely ones.

`Forecast.plan` takes one of them for each task, a different quantile for each, because their mean would be wrong where
it matters: of eight tasks that write either 20 or 1,500 tokens, four are about to leave, and none after 760. And it
cannot say "now" until a task ends: one that has written 30 is no longer among those that write 20, and one that has
outlived all earlier tasks is expected to last as long again as it has lasted.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count, islice

from orchd.queue.price import Progress, PromptPrice, TokenPrice
from orchd.queue.tasks import Task

FIRST_LENGTH = 200
"""Tokens that a task is expected to write before any has ended."""

WINDOW = 64
"""Ended tasks whose lengths are remembered; all of them are new again soon after lengths have changed."""

MAX_PLANNED = 128
"""Waiting tasks that a plan takes one by one; those behind them count as the mean of these."""

GOLDEN = 0.6180339887498949
"""Its multiples, modulo 1, lie evenly, however many there are."""


@dataclass(slots=True)
class Running:
    """A task on a slot.

    Attributes:
        task: Its worker counts its output there.
        since: When it left the queue.
        prompt_tokens: Length of its prompt.
        max_tokens: Most that it may write.
        fixed: Whether it will write exactly that.
        progress: How far it was at the last look; None before its first output token.
    """

    task: Task
    since: float
    prompt_tokens: int
    max_tokens: int
    fixed: bool
    progress: Progress | None = None

    @classmethod
    def of(cls, task: Task, now: float) -> Running:
        """A task that leaves the queue now."""
        return cls(task, now, len(task.tokens), task.request.max_tokens, _is_fixed(task))


class Lengths:
    """How many tokens the last `WINDOW` tasks wrote, and so how many others may write."""

    def __init__(self) -> None:
        self._samples: deque[tuple[int, bool]] = deque(maxlen=WINDOW)
        self._stopped: list[int] = []  # tokens of those that ended by themselves, ascending
        self._cut = 0  # how many were cut off by their max_tokens

    def add(self, tokens: int, *, cut: bool) -> None:
        """A task ended after so many tokens; ``cut`` if its ``max_tokens`` ended it."""
        self._samples.append((tokens, cut))
        self._stopped = sorted(length for length, was_cut in self._samples if not was_cut)
        self._cut = len(self._samples) - len(self._stopped)

    def rest(self, written: int, max_tokens: int, *, quantile: float) -> int:
        """How many more tokens a task may write that has written some: a quantile (0 to 1) of what is likely."""
        most = max(0, max_tokens - written)
        if not self._samples:
            return min(most, max(FIRST_LENGTH - written, written))
        first = bisect_right(self._stopped, written)
        longer = len(self._stopped) - first
        outlived = not longer and bool(self._stopped)
        k = int(quantile * (longer + outlived + self._cut))
        if k < longer:
            return min(most, self._stopped[first + k] - written)
        return min(most, max(1, written)) if outlived and k == 0 else most


class Forecast:
    """Learns from each task that runs, and plans what the others will take. One pool's; one thread at a time."""

    def __init__(self) -> None:
        self.lengths = Lengths()
        self._prompt_price = PromptPrice()
        self._price = TokenPrice()

    def observe(self, running: Running, now: float, *, full: bool) -> None:
        """A task came to its end, by itself or by its ``max_tokens``; ``full`` if no slot was free until then."""
        task = running.task
        self.lengths.add(task.tokens_out, cut=task.tokens_out >= running.max_tokens)
        self._look_at(running, now, full=full, ended=True)

    def plan(self, now: float, running: Iterable[Running], free_slots: int, waiting: Iterable[Task]) -> Plan:
        """When slots come free and waiting tasks start, as of now.

        Args:
            now: The time.
            running: Tasks on slots that can take another one after them.
            free_slots: Slots that nobody has.
            waiting: Tasks in the order in which they start.
        """
        running = list(running)
        for one in running:
            self._look_at(one, now, full=not free_slots)
        quantiles = (n * GOLDEN % 1 for n in count(1))
        ends = [now] * free_slots + [now + self._left_s(one, now, next(quantiles)) for one in running]
        services = [self._service_s(task, next(quantiles)) for task in islice(waiting, MAX_PLANNED)]
        guess_s = self._seconds(1, self.lengths.rest(0, FIRST_LENGTH, quantile=0.5))
        return Plan(now, ends, services, guess_s=guess_s, token_s=self._price.level() * self._price.seconds(0, 1))

    def add_to(self, plan: Plan, task: Task) -> None:
        """Plan one more task, which waits behind all others."""
        plan.append(self._service_s(task, (plan.planned + 1) * GOLDEN % 1))

    def _look_at(self, running: Running, now: float, *, full: bool, ended: bool = False) -> None:
        task = running.task
        if task.first_token_at is None:
            return
        if running.progress is None:
            self._prompt_price.note(running.prompt_tokens, task.first_token_at - running.since)
            running.progress = Progress(task.first_token_at, running.prompt_tokens + 1)
        self._price.note(running.progress, now, running.prompt_tokens + task.tokens_out, full=full, ended=ended)

    def _service_s(self, task: Task, quantile: float) -> float:
        most = task.request.max_tokens
        tokens = most if _is_fixed(task) else self.lengths.rest(0, most, quantile=quantile)
        return self._seconds(len(task.tokens), tokens)

    def _left_s(self, running: Running, now: float, quantile: float) -> float:
        task, most, progress = running.task, running.max_tokens, running.progress
        written = task.tokens_out
        rest = most - written if running.fixed else self.lengths.rest(written, most, quantile=quantile)
        if progress is None:
            waited_s = now - running.since
            return max(self._seconds(running.prompt_tokens, rest) - waited_s, waited_s / 2)
        position, level = running.prompt_tokens + written, self._price.level(progress)
        left_s = level * self._price.seconds(position, position + max(1, rest))
        overdue_s = now - progress.at - level * self._price.seconds(progress.position, position + 1)
        return max(left_s, overdue_s / 2)  # of one that stands still

    def _seconds(self, prompt_tokens: int, tokens: int) -> float:
        """Of a whole task; its first output token comes with the end of its prompt."""
        output_s = self._price.seconds(prompt_tokens + 1, prompt_tokens + max(1, tokens))
        return self._prompt_price.seconds(prompt_tokens) + self._price.level() * output_s


class Plan:
    """When each waiting task is expected to start, and slots come free after them.

    Args:
        now: When it was made.
        ends: When each slot comes free.
        services: Seconds that each waiting task needs, in the order in which they start.
        guess_s: Seconds that a task needs, for as long as none waits.
        token_s: Seconds an output token takes now.
    """

    def __init__(
        self, now: float, ends: list[float], services: Iterable[float] = (), *, guess_s: float, token_s: float = 0.0
    ) -> None:
        self.now = now
        self.token_s = token_s
        self._guess_s = guess_s
        self._slots = ends or [now + guess_s]  # a pool without slots is expected to have one in a while
        heapq.heapify(self._slots)
        self._starts: list[float] = []
        self._sum_s = 0.0  # of the services
        for service_s in services:
            self.append(service_s)

    @property
    def planned(self) -> int:
        """Waiting tasks that were taken one by one."""
        return len(self._starts)

    @property
    def mean_s(self) -> float:
        """Seconds that a waiting task needs, on average."""
        return self._sum_s / len(self._starts) if self._starts else self._guess_s

    @property
    def interval_s(self) -> float:
        """Time from one slot that comes free to the next, in the long run."""
        return self.mean_s / len(self._slots)

    def append(self, service_s: float) -> None:
        """One more task waits behind all others."""
        start = self._slots[0]
        heapq.heapreplace(self._slots, start + service_s)
        self._starts.append(start)
        self._sum_s += service_s

    def start_at(self, k: int) -> float:
        """When the k-th waiting task, from 0, starts; beyond the last one, when another one would."""
        if k < len(self._starts):
            return self._starts[k]
        slots, beyond = sorted(self._slots), k - len(self._starts)
        return slots[beyond % len(slots)] + beyond // len(slots) * self.mean_s


def _is_fixed(task: Task) -> bool:
    return task.request.ignore_eos and not task.request.stop and task.grammar is None
