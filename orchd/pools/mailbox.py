"""From workers' threads to the event loop: what a worker reports is applied there, in its order, and soon.

Each time the loop wakes up, and each client whose text it then sends, takes time from the worker: Python's lock, and on
few cores the threads that compute. So text that comes faster than a screen shows pictures is shown some pieces at a
time: the loop looks for more by itself. What somebody waits for wakes it at once: a task that begins or ends, its first
text, a replica that goes down, and any text that comes more slowly.

For example:

- 100 texts a second, one every 10 ms: fewer than `WORTH_A_LOOK` in `LONGEST_S`. Each wakes the loop, no timer runs.
- 400 a second, one every 2.5 ms: it looks every 7.5 ms, for `TOGETHER` of them: 133 times a second instead of 400.
- 24,000 a second, of the smallest models: three would come in 0.1 ms, so it looks every `SHORTEST_S`.

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
"""Most that text waits for the loop to look: a screen shows no more pictures than that."""

SHORTEST_S = 0.002
"""Least that the loop lets gather: many steps of the smallest models, beside which it works."""

TOGETHER = 3
"""Posts with text that a look should find: the period is so many times the time between them."""

WORTH_A_LOOK = 2
"""Those that it has to find; of fewer, each may as well wake the loop."""


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
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
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
        """Let some text gather, which came once in so many seconds."""
        if not self._looks:
            self._looks = True
            self._period_s = min(max(SHORTEST_S, every_s * TOGETHER), LONGEST_S)
            self._loop.call_later(self._period_s, self._look)

    def _empty(self) -> int:
        """Apply what there is; how many posts of it had text."""
        texts = 0
        while self._posts:
            reports = self._posts.popleft()
            texts += any(isinstance(report, Progress) for report in reports)
            for report in reports:
                self._apply(report)
        return texts


def _can_wait(report: Report) -> bool:
    return isinstance(report, Progress) and not report.first
