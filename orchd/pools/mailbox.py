"""From workers' threads to the event loop: what a worker reports is applied there, in its order, and soon.

Each time the loop wakes up, and each client that it then sends text to, takes time from the worker: Python's lock, and
on a few cores the threads that compute. So text that comes faster than a screen's refresh rate is collected: the loop
looks for it periodically instead of being woken. What a client waits for wakes the loop at once: a task that begins or
ends, its first text, a replica that goes down, and any text that comes more slowly.

For example:

- 100 texts a second, one every 10 ms: fewer than `WORTH_A_LOOK` per `LONGEST_S`. Each wakes the loop; no timer runs.
- 400 a second, one every 2.5 ms: the loop looks every 7.5 ms, for `TOGETHER` of them: 133 times a second, not 400.
- 24,000 a second, from the smallest models: three arrive within 0.1 ms, so the loop looks every `SHORTEST_S`.

One period for all was tried together with one way to write in `orchd.http.sse`: tiny model, alternating pairs, medians
of each pair's ratio. With 1/120 s, 7 pairs: tokens/s 1.14 (1 client) and 0.98 (16), but the 99th percentile of the gaps
between texts grew from 5.9 to 10.1 ms with 16. With 1/240 s, 8 pairs: 0.99 and 0.94, with one client 2.3 to 4.6 ms.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable

from orchd.pools.reports import Progress, Report

LONGEST_S = 1 / 60
"""Longest time that text waits for the loop to look: one frame of a 60 Hz screen."""

SHORTEST_S = 0.002
"""Shortest time between two looks: many steps of the smallest models, which share the cores with the loop."""

TOGETHER = 3
"""Posts with text that a look should find: the period is this many times the interval between posts."""

WORTH_A_LOOK = 2
"""Posts that a look must find to be worth it; with fewer, each can wake the loop itself."""


class Mailbox:
    """Applies what workers report on the event loop. One for all workers.

    Args:
        apply: Takes reports on the event loop; it raises nothing.
        loop: Where it runs.
    """

    def __init__(self, apply: Callable[[Report], None], loop: asyncio.AbstractEventLoop) -> None:
        self._apply = apply
        self._loop = loop
        self._posts: deque[list[Report]] = deque()
        self._woken_at_s = 0.0  # by text
        self._looks = False  # whether it will look without being woken
        self._period_s = LONGEST_S  # how long after it last did

    def post(self, reports: list[Report]) -> None:
        """Take a worker's reports, and the list with them; any thread."""
        self._posts.append(reports)
        if not self._looks or not all(map(_can_wait, reports)):
            with contextlib.suppress(RuntimeError):  # the loop is closed: nothing is left to wake
                self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        texts = self._empty()
        if texts:
            now_s = self._loop.time()
            every_s, self._woken_at_s = (now_s - self._woken_at_s) / texts, now_s
            if every_s * WORTH_A_LOOK < LONGEST_S:
                self._look_later(every_s)

    def _look(self) -> None:
        # Off before looking: a report that is posted after the look wakes the loop itself.
        self._looks = False
        texts = self._empty()
        if texts >= WORTH_A_LOOK:
            self._look_later(self._period_s / texts)

    def _look_later(self, every_s: float) -> None:
        """Collect text for a while; ``every_s`` is the interval at which it came."""
        if not self._looks:
            self._looks = True
            self._period_s = min(max(SHORTEST_S, every_s * TOGETHER), LONGEST_S)
            self._loop.call_later(self._period_s, self._look)

    def _empty(self) -> int:
        """Apply every post; returns how many of them had text."""
        texts = 0
        while self._posts:
            reports = self._posts.popleft()
            texts += any(isinstance(report, Progress) for report in reports)
            for report in reports:
                self._apply(report)
        return texts


def _can_wait(report: Report) -> bool:
    return isinstance(report, Progress) and not report.first
