"""Every accepted task, from its 202 to its one end, and for as long as it is kept after that.

Event loop thread only.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator

from engines.api import FinishReason
from orchd.errors import TaskError
from orchd.queue.tasks import Task, TaskState, TaskStore
from orchd.settings.config import TasksConfig
from orchd.task_log import TaskLog


class OpenTasks:
    """Tasks as the service sees them: accepted, started, ended, each of it logged.

    Args:
        config: How long tasks are kept.
        clock: Monotonic seconds.
    """

    def __init__(self, config: TasksConfig, clock: Callable[[], float]) -> None:
        self.store = TaskStore(
            retention_s=config.retention_s,
            retained_bytes=config.retained_bytes,
            cancel_grace_s=config.cancel_grace_s,
            clock=clock,
        )
        self.log = TaskLog(clock)
        self._n_open = 0
        self._none_open = asyncio.Event()
        self._none_open.set()

    def __iter__(self) -> Iterator[Task]:
        """Those that have not ended."""
        return (task for task in list(self.store) if task.state is not TaskState.ENDED)

    @property
    def running(self) -> int:
        """How many a worker has taken and not ended."""
        return sum(task.state is TaskState.RUNNING for task in self)

    def add(self, task: Task) -> None:
        """Keep a task that is about to be accepted; from now on it needs an end."""
        self.store.add(task)
        self._n_open += 1
        self._none_open.clear()

    def start(self, task: Task, replica_id: str, device: str) -> None:
        """A worker took it."""
        task.start()
        self.log.started(task, replica_id, device)

    def end(self, task: Task, reason: FinishReason, *, decode_ms: int = 0, error: TaskError | None = None) -> None:
        """Its one end."""
        task.end(reason, decode_ms=decode_ms, error=error)
        self.log.ended(task, reason, decode_ms=decode_ms, error=error)
        self.store.note_end(task)
        self._n_open -= 1
        if self._n_open == 0:
            self._none_open.set()

    async def wait(self, timeout_s: float) -> None:
        """Return when all have ended, or when the time is over."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._none_open.wait(), timeout_s)
