"""Tasks in each of their states."""

from __future__ import annotations

from engines.api import FinishReason
from orchd.queue.tasks import Task, TaskState
from orchd.schemas import Accepted
from testkit.builders import make_task


def move(task: Task, to: TaskState) -> None:
    if to is TaskState.RUNNING:
        task.start()
    elif to is TaskState.ENDED:
        task.end(FinishReason.STOP)
    else:
        task._move(to)


def accepted_task(state: TaskState = TaskState.WAITING) -> Task:
    task = make_task()
    task.accepted = Accepted(task_id=task.id, queue_position=3, predicted_start_ms=70, backoff_ms=0)
    if state is not TaskState.WAITING:
        move(task, state)
    return task
