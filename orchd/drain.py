"""How fast a pool works its queue off, and what that means for those who wait or are sent away.

The model: tasks take `DrainRate.service_s` each, a moving average of those that ended; a slot that ends one takes the
next. With the N running tasks' expected ends sorted, e(0) <= ... <= e(N-1), the k-th slot to come free (k from 0) does
so at e(k mod N) + (k div N) * service_s.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from itertools import islice

FIRST_GUESS_S = 2.0
"""Service time before any task has ended."""

MAX_PROMISES = 4096
"""Promises that are kept at a time; who is sent away beyond that is told the pause of the last one."""

_WEIGHT = 0.1  # of the newest task in the moving averages
_SHARE = 0.05  # a promise is later than the estimate by this much of the pause, for the error of the average,
_SPREAD = 3.0  # and by so many mean deviations of one task: too late costs little, too early costs a round trip
_LEAST_S = 0.005
_GRACE_S = 0.5  # how late the one who was promised a place may come
_EARLY_S = 0.002  # and how early


class DrainRate:
    """Learns service times and predicts when slots come free. Times are monotonic seconds."""

    def __init__(self) -> None:
        self.service_s = FIRST_GUESS_S
        self._spread_s = 0.0  # mean distance of a service time from the average
        self._measured = False

    def observe(self, service_s: float) -> None:
        """A task ended after so much time on its slot."""
        if not self._measured:
            self.service_s, self._measured = service_s, True
        error_s = service_s - self.service_s
        self.service_s += _WEIGHT * error_s
        self._spread_s += _WEIGHT * (abs(error_s) - self._spread_s)

    def schedule(self, now: float, started: Iterable[float], free_slots: int) -> Schedule:
        """Expected ends for tasks that started at these times, beside so many free slots."""
        service_s = self.service_s
        ends = [now] * free_slots + [max(start + service_s, now) for start in started]
        ends.sort()
        return Schedule(now, ends, service_s, self._spread_s)


class Schedule:
    """When slots are expected to come free, as of one moment."""

    def __init__(self, now: float, ends: list[float], service_s: float, spread_s: float = 0.0) -> None:
        self.now = now
        self._spread_s = spread_s
        self._ends = ends
        self._service_s = service_s

    @property
    def interval_s(self) -> float:
        """Time from one slot that comes free to the next, in the long run."""
        return self._service_s / max(1, len(self._ends))

    def free_at(self, k: int) -> float:
        """When the k-th slot, from 0, comes free; a service time from now for a pool without slots."""
        if not self._ends:
            return self.now + self._service_s * (k + 1)
        return self._ends[k % len(self._ends)] + (k // len(self._ends)) * self._service_s

    def safe_at(self, k: int) -> float:
        """When the k-th slot, from 0, has come free with some certainty."""
        wait_s = self.free_at(k) - self.now
        return self.now + wait_s * (1 + _SHARE) + self._spread_s * _SPREAD + _LEAST_S


class Promises:
    """Places in a full queue that senders were told to come back for.

    A sender that is sent away learns when its place will be free. Until it comes, or is late, others may take only
    places that its one does not depend on; without that, whoever happens to knock at the right moment would take it and
    the promise would be empty. Senders are not told apart: who comes at the promised time is who was promised.
    """

    def __init__(self) -> None:
        self._due: deque[float] = deque()  # ascending

    def __len__(self) -> int:
        return len(self._due)

    def make(self, schedule: Schedule, free_places: int) -> float:
        """Promise the next place nobody was promised yet; returns the pause to make, in seconds.

        Who comes for a promised place and finds none gets a new promise instead of the old one.
        """
        now = schedule.now
        self._expire(now)
        self._pop_due(now)
        due = schedule.safe_at(max(0, len(self._due) - free_places))
        if self._due:  # where the estimate has become shorter, promises must not fall together
            due = max(due, self._due[-1] + schedule.interval_s)
        if len(self._due) < MAX_PROMISES:
            self._due.append(due)
        return due - now

    def admits(self, schedule: Schedule, free_places: int) -> bool:
        """Whether someone who comes now may have one of so many free places, at least one."""
        self._expire(schedule.now)
        if not self._due or self._is_due(schedule.now):
            return True
        beyond = islice(self._due, free_places - 1, None)  # those that need more than the places that would be left
        return all(schedule.safe_at(k) <= due for k, due in enumerate(beyond))

    def redeem(self, now: float) -> None:
        """Someone was admitted: if a promise was due, it is kept."""
        self._pop_due(now)

    def _pop_due(self, now: float) -> None:
        if self._due and self._is_due(now):
            self._due.popleft()

    def _is_due(self, now: float) -> bool:
        return self._due[0] <= now + _EARLY_S

    def _expire(self, now: float) -> None:
        while self._due and self._due[0] + _GRACE_S < now:
            self._due.popleft()
