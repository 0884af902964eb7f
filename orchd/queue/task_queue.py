"""Waiting tasks in the order in which they start: two priorities, first in first out inside each."""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from orchd.queue.tasks import Task
from orchd.schemas import Priority

_RANK = {Priority.INTERACTIVE: 0, Priority.BATCH: 1}
_SMALL = 64
"""A heap with fewer entries than this is not worth rebuilding."""


@dataclass(order=True, slots=True)
class _Entry:
    rank: int
    number: int
    task: Task = field(compare=False)
    live: bool = field(default=True, compare=False)


class TaskQueue:
    """A heap. Iterating gives every waiting task in the order in which they start. The caller holds the lock.

    A task that is removed from the middle leaves a dead entry behind, which goes when it comes up, or when most of a
    large heap is dead: `remove` is O(1) amortised.
    """

    def __init__(self) -> None:
        self._heap: list[_Entry] = []
        self._live: dict[Priority, OrderedDict[str, _Entry]] = {priority: OrderedDict() for priority in Priority}
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return sum(map(len, self._live.values()))

    def __iter__(self) -> Iterator[Task]:
        for priority in sorted(Priority, key=_RANK.__getitem__):
            for entry in self._live[priority].values():
                yield entry.task

    @property
    def depth(self) -> dict[Priority, int]:
        """Waiting tasks by priority."""
        return {priority: len(live) for priority, live in self._live.items()}

    def get(self, task_id: str) -> Task | None:
        """The task, if it waits."""
        for live in self._live.values():
            if (entry := live.get(task_id)) is not None:
                return entry.task
        return None

    def ahead_of(self, priority: Priority) -> int:
        """How many tasks a new one would wait behind."""
        return sum(len(live) for other, live in self._live.items() if _RANK[other] <= _RANK[priority])

    def push(self, task: Task) -> None:
        """Add a task behind all of its priority."""
        entry = _Entry(_RANK[task.priority], next(self._numbers), task)
        heapq.heappush(self._heap, entry)
        self._live[task.priority][task.id] = entry

    def pop(self) -> Task:
        """Take the first task out. Raises `IndexError` where none waits."""
        while True:
            entry = heapq.heappop(self._heap)
            if entry.live:
                del self._live[entry.task.priority][entry.task.id]
                return entry.task

    def remove(self, task: Task) -> None:
        """Take a task out, wherever it stands. Raises `KeyError`."""
        self._live[task.priority].pop(task.id).live = False
        if len(self._heap) > max(_SMALL, 2 * len(self)):
            self._heap = [kept for kept in self._heap if kept.live]
            heapq.heapify(self._heap)

    def clear(self) -> list[Task]:
        """Take every task out; returns them in order."""
        tasks = list(self)
        self._heap.clear()
        for live in self._live.values():
            live.clear()
        return tasks

    def check_integrity(self) -> None:
        """Assert that heap and index agree, in content and in order; for tests."""
        in_heap = [entry.task for entry in sorted(self._heap) if entry.live]
        assert in_heap == list(self)
        for priority, live in self._live.items():
            assert all(entry.task.priority is priority for entry in live.values())
