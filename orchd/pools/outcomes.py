"""What becomes of the tasks on a device, as a worker tells it: what they wrote, and how each of them ended."""

from __future__ import annotations

import logging
from collections.abc import Callable

from engines.api import FinishReason, StepEvent
from orchd.errors import Internal, InvalidParams, TaskError
from orchd.pools.replica import Instance, Replica
from orchd.pools.reports import Begun, Ended, Progress, Report
from orchd.queue.tasks import Task

_log = logging.getLogger(__name__)


class Outcomes:
    """Gathers reports until the worker takes them. Whatever ends here ends once. The worker's thread only.

    Args:
        device: Name of the device, for messages.
        clock: Monotonic seconds.
    """

    def __init__(self, device: str, *, clock: Callable[[], float]) -> None:
        self._device = device
        self._clock = clock
        self._reports: list[Report] = []

    def add(self, report: Report) -> None:
        """Something else happened."""
        self._reports.append(report)

    def take(self) -> list[Report]:
        """What was gathered, in order."""
        reports, self._reports = self._reports, []
        return reports

    def begun(self, replica: Replica, task: Task) -> None:
        """A task has left the queue."""
        self._reports.append(Begun(task, replica))

    def refused(self, replica: Replica, task: Task) -> None:
        """The model did not take a task that had begun; it never was among its tasks."""
        problem = Internal("the task could not be started; see the server's log")
        self._end(replica, task, FinishReason.ERROR, problem)

    def stepped(self, replica: Replica, instance: Instance, event: StepEvent) -> None:
        """A step has brought a task further, or to its end."""
        task = instance.tasks.get(event.key)
        if task is None:  # a model that repeats itself harms nobody
            return
        replica.tokens_out += event.tokens_out - task.tokens_out
        task.tokens_out = event.tokens_out
        task.tokens_read, task.tokens_cached = event.tokens_read, event.tokens_cached
        if task.first_token_at is None and (event.tokens_out or event.finish is FinishReason.STOP):
            task.first_token_at = self._clock()
        if event.reasoning and task.request.reasoning:
            self._show(task, event.reasoning, event.reasoning_index, reasoning=True)
        if event.text:
            self._show(task, event.text, event.index)
        if event.finish is None:
            return
        del instance.tasks[event.key]
        if event.finish is FinishReason.ERROR:
            _log.error("task %s ended on %s: %s", task.id, self._device, event.problem or "NaN or infinity computed")
            self._end(replica, task, event.finish, _no_more(event.problem) if event.problem else _no_numbers())
        else:
            replica.setbacks = 0
            self._end(replica, task, event.finish)

    def cancelled(self, replica: Replica, instance: Instance, task: Task) -> None:
        """Nobody wants a task any more; its slot is free for others."""
        del instance.tasks[task.id]
        _free(instance, task)
        self._end(replica, task, FinishReason.CANCELLED)

    def taken_away(self, replica: Replica, instance: Instance, error: TaskError) -> None:
        """A model goes on without the tasks it has."""
        for task in instance.tasks.values():
            _free(instance, task)
        self.lost(replica, instance, FinishReason.ERROR, error)

    def lost(self, replica: Replica, instance: Instance, reason: FinishReason, error: TaskError | None = None) -> None:
        """A model has nothing left of the tasks it had, or goes with them."""
        tasks, instance.tasks = list(instance.tasks.values()), {}
        for task in tasks:
            self._end(replica, task, reason, error)

    def _show(self, task: Task, text: str, index: int, *, reasoning: bool = False) -> None:
        self._reports.append(Progress(task, text, index, first=not task.shown, reasoning=reasoning))
        task.shown = True

    def _end(self, replica: Replica, task: Task, reason: FinishReason, error: TaskError | None = None) -> None:
        replica.scheduler.release(replica.slots, task, completed=reason in (FinishReason.STOP, FinishReason.LENGTH))
        first = task.first_token_at
        decode_ms = 0 if first is None else round((self._clock() - first) * 1000)
        self._reports.append(Ended(task, reason, decode_ms, error))


def _free(instance: Instance, task: Task) -> None:
    try:
        instance.model.cancel(task.id)
    except Exception:
        _log.exception("task %s could not be cancelled; its slot cannot be used until the next reset", task.id)


def _no_numbers() -> TaskError:
    return Internal("the model computed no valid next token (NaN or infinity); its file may be damaged")


def _no_more(problem: str) -> TaskError:
    return InvalidParams(f"json_schema: the text cannot continue: {problem}; make the schema simpler")
