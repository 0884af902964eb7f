"""One pool's place on one device, and the models that are there."""

from __future__ import annotations

from dataclasses import dataclass, field

from engines.api import LoadedModel
from orchd.scheduler import Scheduler
from orchd.seat import Seat
from orchd.tasks import Task


@dataclass(eq=False)
class Host:
    """A loaded model on a replica and the tasks that run on it. Worker thread only, once hosted.

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


@dataclass(eq=False)
class Replica:
    """One pool's place on one device.

    Attributes:
        id: Its index in the pool, as text.
        device: Name of its device.
        seat: Its side of the scheduler.
        scheduler: Where its tasks come from.
        hosts: Its models, the current one last; more than one only while a reload lets old tasks finish.
        tokens_in: Prompt tokens it ever took; written by the worker.
        tokens_out: Output tokens it ever made; written by the worker.
        setbacks: Times it was given up since it last finished a task; written by the worker.
    """

    id: str
    device: str
    seat: Seat
    scheduler: Scheduler
    hosts: list[Host] = field(default_factory=list)
    tokens_in: int = 0
    tokens_out: int = 0
    setbacks: int = 0

    @property
    def device_bytes(self) -> int:
        """Bytes of device memory that its models hold, as their engine counts them; any thread."""
        hosts = {*self.hosts, self.seat.host} - {None}  # a new one may not have been adopted yet
        return sum(host.model.device_bytes for host in hosts)
