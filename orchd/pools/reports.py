"""What a worker tells the event loop."""

from __future__ import annotations

from dataclasses import dataclass

from engines.api import FinishReason
from orchd.errors import TaskError
from orchd.pools.replica import Replica
from orchd.queue.tasks import Task


@dataclass(frozen=True)
class Begun:
    """A task left the queue, for a replica."""

    task: Task
    replica: Replica


@dataclass(frozen=True)
class Progress:
    """A step brought a task forward.

    Attributes:
        task: The task.
        text: What may be shown.
        index: Of the last token that it holds.
        first: Whether none was shown before.
        reasoning: Whether it is no part of the answer.
    """

    task: Task
    text: str
    index: int
    first: bool = False
    reasoning: bool = False


@dataclass(frozen=True)
class Ended:
    """A task is over and its slot is free."""

    task: Task
    reason: FinishReason
    decode_ms: int = 0
    error: TaskError | None = None


@dataclass(frozen=True)
class ReplicaDown:
    """A replica was given up, and its slots are not ready. Its models are closed, unless its device is lost."""

    replica: Replica
    why: str


@dataclass(frozen=True)
class InstanceClosed:
    """A model that was replaced has ended its last task and is closed."""

    replica: Replica


Report = Begun | Progress | Ended | ReplicaDown | InstanceClosed
