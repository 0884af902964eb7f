"""How long a sender is told to wait if the queue is full.

No place is reserved for a refused sender: the next one to arrive takes a free place. So a sender is told to come back
when a place is expected that no other sender will return for. How many return is learnt, because a refused sender may
never come back, and then no other should wait because of it.

For example, one slot becomes free every second, and five senders are refused at once:
- nothing is known yet, so each is told to wait for the next place: 1.8 to 2.6 s;
- if none of them comes back, the sixth is told the same, 2.5 s;
- if all come back after 2 s, one is admitted, and the others, of which some may return again, are told 3.3 to 3.9 s;
- once every refused sender is known to return, each waits for a place of its own: 2.4, 3.2, 5.1, 6.0 and 6.8 s.
"""

from __future__ import annotations

import heapq

from orchd.queue.forecast import GOLDEN, Plan

_WEIGHT = 0.1  # of the sender that was seen, or missed, last
_LATER = 1.25  # times the estimate: a little too late costs little, a little too early costs a round trip
_MAX_TOLD = 4096

_EARLY_S = 0.002
_LATE_S = 1.5
"""How late a sender may arrive and still count as returning: `Retry-After` is in whole seconds."""


class Backoff:
    """The pauses of one pool's senders of one priority.

    A sender is recognised by the id of its task. One without an id counts as a sender that was told to come about now.

    Args:
        most_places: How far beyond the next place a pause may reach.
    """

    def __init__(self, most_places: int) -> None:
        self.returning = 0.0
        """Share of refused senders that come back."""
        self._most_places = most_places
        self._named: dict[str, float] = {}  # when each task that was refused should come back
        self._order: list[tuple[float, str]] = []  # a heap of the same, and of some that came back meanwhile
        self._nameless: list[float] = []  # a heap: when those without an id should
        self._refusals = 0

    def pause_s(self, plan: Plan, place: int, task_id: str | None = None) -> float:
        """Seconds that a sender is told to wait.

        Args:
            plan: When waiting tasks start.
            place: Index of the waiting task whose start makes room.
            task_id: The id by which the sender will be recognised.
        """
        self._refusals += 1
        told = len(self._named) + len(self._nameless)
        others = round(min(self.returning * told, self._most_places))
        wait_s = max(plan.start_at(place + others) - plan.now, plan.token_s) * _LATER
        # Senders that arrive together get the same estimate; this spreads them out.
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
        """A sender arrived, for the first time or again."""
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
