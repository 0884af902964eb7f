"""Waiting tasks in the order in which they start: two priorities, first in first out inside each."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from orchd.schemas import Priority
from orchd.tasks import Task

_RANK = {Priority.INTERACTIVE: 0, Priority.BATCH: 1}
_SMALL = 64
"""A heap of so many entries is not worth rebuilding."""


@dataclass(order=True, slots=True)
class _Entry:
    rank: int
    number: int
    task: Task = field(compare=False)
    live: bool = field(default=True, compare=False)


class TaskQueue:
    """A heap. Iterating gives every waiting task, in no order. It has no lock: whoever owns it has one.

    A task that is removed from the middle leaves a dead entry behind, which goes when it comes up, or when most of a
    large heap is dead: `remove` is O(1) amortised.
    """

    def __init__(self) -> None:
        self._heap: list[_Entry] = []
        self._live: dict[str, _Entry] = {}
        self._numbers = itertools.count()
        self.depth: Counter[Priority] = Counter(dict.fromkeys(Priority, 0))
        """Waiting tasks by priority."""

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[Task]:
        return (entry.task for entry in self._live.values())

    def get(self, task_id: str) -> Task | None:
        """The task, if it waits."""
        entry = self._live.get(task_id)
        return None if entry is None else entry.task

    def ahead_of(self, priority: Priority) -> int:
        """How many tasks a new one would wait behind."""
        return sum(self.depth[other] for other in Priority if _RANK[other] <= _RANK[priority])

    def push(self, task: Task) -> None:
        """Add a task behind all of its priority."""
        entry = _Entry(_RANK[task.priority], next(self._numbers), task)
        heapq.heappush(self._heap, entry)
        self._live[task.id] = entry
        self.depth[task.priority] += 1

    def pop(self) -> Task:
        """Take the first task out. Raises `IndexError` where none waits."""
        while True:
            entry = heapq.heappop(self._heap)
            if entry.live:
                self._forget(entry)
                return entry.task

    def remove(self, task_id: str) -> None:
        """Take a task out, wherever it stands. Raises `KeyError`."""
        entry = self._live[task_id]
        entry.live = False
        self._forget(entry)
        if len(self._heap) > max(_SMALL, 2 * len(self._live)):
            self._heap = [kept for kept in self._heap if kept.live]
            heapq.heapify(self._heap)

    def clear(self) -> list[Task]:
        """Take every task out; returns them in order."""
        tasks = [entry.task for entry in sorted(self._live.values())]
        self._heap.clear()
        self._live.clear()
        self.depth = Counter(dict.fromkeys(Priority, 0))
        return tasks

    def check_integrity(self) -> None:
        """Assert that heap, index and counts agree; for tests."""
        live = [entry for entry in self._heap if entry.live]
        assert {entry.task.id for entry in live} == set(self._live)
        assert len(live) == len(self._live)
        assert self.depth == Counter(entry.task.priority for entry in live)

    def _forget(self, entry: _Entry) -> None:
        del self._live[entry.task.id]
        self.depth[entry.task.priority] -= 1
