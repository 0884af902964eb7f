"""From workers' threads to the event loop: what a worker reports is applied there, in its order, and soon.

Waking the loop costs a worker more than a step of a small model takes, and the two then fight for Python's lock. So
while text comes faster than once in `PERIOD_S` the loop looks for more by itself, that much later, and is woken for the
rest only: a task that begins or ends, a replica that goes down. Steps that take longer are reported at once.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable

from orchd.reports import Progress, Report

PERIOD_S = 0.002
"""Longest that text waits for the loop to look: too short to be seen, and many steps of the smallest models."""


class Mailbox:
    """See the module. One for all workers.

    Args:
        apply: Takes reports on the event loop; it raises nothing.
        loop: Where it runs.
    """

    def __init__(self, apply: Callable[[Report], None], loop: asyncio.AbstractEventLoop) -> None:
        self._apply = apply
        self._loop = loop
        self._reports: deque[Report] = deque()
        self._woken_at_s = 0.0  # by text
        self._looks = False  # whether the loop will look without being woken

    def post(self, reports: list[Report]) -> None:
        """Take a worker's reports; any thread."""
        self._reports.extend(reports)
        if not self._looks or not all(isinstance(report, Progress) for report in reports):
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
                self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        if self._empty():
            now_s = self._loop.time()
            if now_s - self._woken_at_s < PERIOD_S:
                self._look_later()
            self._woken_at_s = now_s

    def _look(self) -> None:
        # Off before looking: a report that is posted after the look wakes the loop itself.
        self._looks = False
        if self._empty():
            self._look_later()

    def _look_later(self) -> None:
        if not self._looks:
            self._looks = True
            self._loop.call_later(PERIOD_S, self._look)

    def _empty(self) -> bool:
        """Apply what there is; whether any of it was text."""
        progress = False
        while self._reports:
            report = self._reports.popleft()
            progress = progress or isinstance(report, Progress)
            self._apply(report)
        return progress
