"""From workers' threads to the event loop: what a worker reports is applied there, in its order, and soon.

Waking the loop costs a worker more than a step of a small model takes, and the two then fight for Python's lock. So
while text keeps coming the loop looks for more by itself, `PERIOD_S` later, and is woken for the rest only: a task that
begins or ends, a replica that goes down. Steps that take longer than that are reported at once.
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
        self._looks = False  # whether the loop will look without being woken

    def post(self, reports: list[Report]) -> None:
        """Take a worker's reports; any thread."""
        self._reports.extend(reports)
        if not self._looks or not all(isinstance(report, Progress) for report in reports):
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
                self._loop.call_soon_threadsafe(self._empty)

    def _look(self) -> None:
        # Off before looking: a report that is posted after the look wakes the loop itself.
        self._looks = False
        self._empty()

    def _empty(self) -> None:
        progress = False
        while self._reports:
            report = self._reports.popleft()
            progress = progress or isinstance(report, Progress)
            self._apply(report)
        if progress and not self._looks:
            self._looks = True
            self._loop.call_later(PERIOD_S, self._look)
