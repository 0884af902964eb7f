"""A pool's model on one of its devices, and its owner there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from engines.api import LoadedModel
from orchd.errors import TaskError
from orchd.queue.scheduler import Scheduler
from orchd.queue.slots import ReplicaSlots
from orchd.queue.tasks import Task


@dataclass(eq=False)
class Instance:
    """A loaded model on a replica and the tasks that run on it. Worker thread only, once it is adopted.

    Attributes:
        model: What steps.
        tasks: By id.
        failures: Steps that failed in a row.
        streams_s: How long its last step took in which no prompt was prefilled; 0 if there was none.
    """

    model: LoadedModel
    tasks: dict[str, Task] = field(default_factory=dict)
    failures: int = 0
    streams_s: float = 0.0

    @property
    def streams(self) -> int:
        """Its tasks that are past their prompt."""
        return sum(task.first_token_at is not None for task in self.tasks.values())


class Owner(Protocol):
    """The worker of a replica's device, as others may ask it; any thread. See `orchd.pools.worker.Worker`."""

    def wake(self) -> None:
        """There may be something to do."""

    def adopt(self, replica: Replica, instance: Instance) -> None:
        """Own an instance from now on."""

    def cancel(self, task: Task) -> None:
        """End a task, if it runs there."""

    def end_tasks(self, replica: Replica, error: TaskError) -> None:
        """End whatever a replica still runs."""

    def stalled_s(self) -> float:
        """Seconds since it was last seen to move; 0 if it is idle."""


@dataclass(eq=False)
class Replica:
    """A pool's model on one of its devices.

    Attributes:
        id: Its index in the pool, as text.
        device: Name of its device.
        slots: Its side of the scheduler.
        scheduler: Where its tasks come from.
        worker: The thread of its device, which other pools' replicas there share.
        instances: Its models, the current one last; more than one only while a reload lets old tasks finish.
        tokens_in: Prompt tokens it ever took; written by the worker.
        tokens_out: Output tokens it ever made; written by the worker.
        setbacks: Times it was given up since it last finished a task; written by the worker.
    """

    id: str
    device: str
    slots: ReplicaSlots[Instance]
    scheduler: Scheduler[Instance]
    worker: Owner
    instances: list[Instance] = field(default_factory=list)
    tokens_in: int = 0
    tokens_out: int = 0
    setbacks: int = 0

    @property
    def device_bytes(self) -> int:
        """Bytes of device memory that its models hold, as their engine counts them; any thread."""
        instances = {*self.instances, self.slots.instance}  # a new one may not have been adopted yet
        return sum(instance.model.device_bytes for instance in instances if instance is not None)
