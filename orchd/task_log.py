"""The log of what happens to tasks, ``orchd.tasks``: a line each, the end of a task at INFO and all else at DEBUG.

No line holds any text of a prompt or an answer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from engines.api import FinishReason
from orchd.errors import TaskError
from orchd.queue.tasks import Task
from orchd.schemas import TaskRequest

_log = logging.getLogger("orchd.tasks")


@dataclass
class _Times:
    """Monotonic seconds."""

    accepted_at: float
    started_at: float | None = None


class TaskLog:
    """Keeps the times of every task that has not ended. Event loop thread only.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._times: dict[str, _Times] = {}

    def refused(self, request: TaskRequest | None, error: TaskError) -> None:
        """A submit got an error.

        What is wrong with a body that could not be read is not said: the sentence may quote anything that is in it.
        """
        if request is None:
            _log.debug("a task was refused: %s", error.code.value)
            return
        said = "".join(char if char.isprintable() else " " for char in str(error))
        _log.debug("task %s refused: %s: %s", request.task_id or "without an id", error.code.value, said)

    def accepted(self, task: Task, prompt_tokens: int) -> None:
        """A submit got its 202."""
        self._times[task.id] = _Times(self._clock())
        answer = task.accepted
        assert answer is not None  # it was accepted
        _log.debug(
            "task %s accepted: pool %s, %s, %d prompt tokens, max_tokens %d; %d ahead, start expected in %d ms",
            task.id,
            task.pool_id,
            task.priority.value,
            prompt_tokens,
            task.request.max_tokens,
            answer.queue_position,
            answer.predicted_start_ms,
        )

    def repeated(self, task: Task) -> None:
        """A submit was sent again and got its first answer again."""
        _log.debug("task %s submitted again: it gets its first answer", task.id)

    def started(self, task: Task, replica_id: str, device: str) -> None:
        """A worker took it."""
        times = self._times[task.id]
        times.started_at = self._clock()
        waited_s = times.started_at - times.accepted_at
        _log.debug("task %s started: %s/%s on %s, after %.3f s", task.id, task.pool_id, replica_id, device, waited_s)

    def ended(self, task: Task, reason: FinishReason, *, decode_ms: int, error: TaskError | None) -> None:
        """It has ended, for whatever reason, and was started or not."""
        times, now = self._times.pop(task.id), self._clock()
        if times.started_at is None:
            spent = f"after {now - times.accepted_at:.2f} s in the queue"
        else:
            spent = f"{task.tokens_out} tokens in {now - times.started_at:.2f} s"
            if decode_ms and task.tokens_out > 1:
                spent += f" ({1000 * (task.tokens_out - 1) / decode_ms:.1f} a second)"
        why = "" if error is None else f" ({error.code.value})"
        _log.info("task %s ended: %s%s, %s", task.id, reason.value, why, spent)
