"""How fast a pool works its queue off, and what that means for those who wait or are sent away.

The model: tasks take `DrainRate.service_s` each, a moving average of those that ended; a slot that ends one takes the
next. With the N running tasks' expected ends sorted, e(0) <= ... <= e(N-1), the k-th slot to come free (k from 0) does so
at e(k mod N) + (k div N) * service_s.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

FIRST_GUESS_S = 2.0
"""Service time before any task has ended."""

_WEIGHT = 0.1  # of the newest task in the average
_MARGIN = (
    1.1  # a promise is this much later than the estimate: too late costs little, too early costs a round trip
)
_GRACE_S = 0.5  # how late the one who was promised a place may come


class DrainRate:
    """Learns service times and predicts when slots come free. Times are monotonic seconds."""

    def __init__(self) -> None:
        self.service_s = FIRST_GUESS_S
        self._measured = False

    def observe(self, service_s: float) -> None:
        """A task ended after so much time on its slot."""
        if self._measured:
            self.service_s += _WEIGHT * (service_s - self.service_s)
        else:
            self.service_s, self._measured = service_s, True

    def schedule(self, now: float, started: Iterable[float], free_slots: int) -> Schedule:
        """Expected ends for tasks that started at these times, beside so many free slots."""
        ends = [max(start + self.service_s, now) for start in started]
        return Schedule(now, sorted([now] * free_slots + ends), self.service_s)


class Schedule:
    """When slots are expected to come free, as of one moment."""

    def __init__(self, now: float, ends: list[float], service_s: float) -> None:
        self.now = now
        self._ends = ends
        self._service_s = service_s

    def free_at(self, k: int) -> float:
        """When the k-th slot, from 0, comes free; a service time from now for a pool without slots."""
        if not self._ends:
            return self.now + self._service_s * (k + 1)
        return self._ends[k % len(self._ends)] + (k // len(self._ends)) * self._service_s

    def freed_by(self, when: float) -> int:
        """How many slots come free until then."""
        rounds = 0
        for end in self._ends:
            if end <= when:
                rounds += 1 + int((when - end) / self._service_s) if self._service_s > 0 else 1
        return rounds


class Promises:
    """Places in a full queue that senders were told to come back for.

    A sender that is sent away learns when its place will be free. Until it comes, or is late, others may take only
    places that its one does not depend on; without that, whoever happens to knock at the right moment would take it and
    the promise would be empty. Senders are not told apart: who comes at the promised time is who was promised.
    """

    def __init__(self) -> None:
        self._due: deque[float] = deque()

    def make(self, schedule: Schedule) -> float:
        """Promise the next place nobody was promised yet; returns the pause to make, in seconds."""
        self._expire(schedule.now)
        pause_s = (schedule.free_at(len(self._due)) - schedule.now) * _MARGIN + 0.005
        latest = self._due[-1] if self._due else schedule.now
        due = max(schedule.now + pause_s, latest)
        self._due.append(due)
        return due - schedule.now

    def admits(self, schedule: Schedule, free_places: int) -> bool:
        """Whether someone who comes now may have one of so many free places."""
        self._expire(schedule.now)
        if not self._due or self._is_due(schedule.now):
            return True
        return all(
            free_places - 1 + schedule.freed_by(due) >= rank for rank, due in enumerate(self._due, start=1)
        )

    def redeem(self, now: float) -> None:
        """Someone was admitted: if a promise was due, it is kept."""
        if self._due and self._is_due(now):
            self._due.popleft()

    def _is_due(self, now: float) -> bool:
        return self._due[0] <= now + 0.002

    def _expire(self, now: float) -> None:
        while self._due and self._due[0] + _GRACE_S < now:
            self._due.popleft()
