"""What senders that find the queue full are told: when to come back.

No place is held for anyone: whoever comes while there is a place gets it. So a pause ends when the next place is
expected that nobody else comes back for. How many do come back is learnt, because a sender that was refused may never
be seen again, and nobody should wait for it. Say the queue gets a place every second, and five senders are refused: all
are told about two seconds. If none of them comes back, the sixth is told the same. If all do, one is admitted, and the
other four are told a second, two, three and four more; from then on such senders are taken at their word.
"""

from __future__ import annotations

import heapq

from orchd.queue.forecast import GOLDEN, Plan

_WEIGHT = 0.1  # of the sender that was seen, or missed, last
_LATER = 1.25  # times the estimate: a little too late costs little, a little too early costs a round trip
_MAX_TOLD = 4096

_EARLY_S = 0.002
_LATE_S = 1.5
"""How late a sender may come and still be taken for one that was told to: `Retry-After` is in whole seconds."""


class Backoff:
    """The pauses of one pool's senders of one priority.

    A sender is known again by the id of its task. One that sends none is taken for one that was told to come about now.

    Args:
        most_places: How far beyond the next place a pause may reach.
    """

    def __init__(self, most_places: int) -> None:
        self.returning = 0.0
        """Share of those that were told to come back who do."""
        self._most_places = most_places
        self._named: dict[str, float] = {}  # when each task that was refused should come back
        self._order: list[tuple[float, str]] = []  # a heap of the same, and of some that came back meanwhile
        self._nameless: list[float] = []  # a heap: when those without an id should
        self._refusals = 0

    def pause_s(self, plan: Plan, place: int, task_id: str | None = None) -> float:
        """How long a sender is told to wait.

        Args:
            plan: When waiting tasks start.
            place: How many of them have to before there is room, less one.
            task_id: What it will be known by.
        """
        self._refusals += 1
        told = len(self._named) + len(self._nameless)
        others = round(min(self.returning * told, self._most_places))
        wait_s = max(plan.start_at(place + others) - plan.now, plan.token_s) * _LATER
        # Estimates are alike for all who come at once, so what follows is not.
        wait_s += (0.5 + self._refusals * GOLDEN % 1) * plan.interval_s
        if len(self._order) + len(self._nameless) < _MAX_TOLD:
            due = plan.now + wait_s
            if task_id is None:
                heapq.heappush(self._nameless, due)
            else:
                self._named[task_id] = due
                heapq.heappush(self._order, (due, task_id))
        return wait_s

    def note_sender(self, now: float, task_id: str | None = None) -> None:
        """Someone came, for the first time or again."""
        if task_id is not None and self._named.pop(task_id, None) is not None:
            self._learn(came=True)
        late = now - _LATE_S
        while self._order and self._order[0][0] < late:
            due, missed = heapq.heappop(self._order)
            if self._named.get(missed) == due:
                del self._named[missed]
                self._learn(came=False)
        while self._nameless and self._nameless[0] < late:
            heapq.heappop(self._nameless)
            self._learn(came=False)
        if task_id is None and self._nameless and self._nameless[0] <= now + _EARLY_S:
            heapq.heappop(self._nameless)
            self._learn(came=True)

    def _learn(self, *, came: bool) -> None:
        self.returning += _WEIGHT * (came - self.returning)
