"""A replica as its pool's scheduler sees it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from orchd.queue.forecast import Running
from orchd.schemas import Priority

T = TypeVar("T")


def _nobody() -> None:
    """There is no worker to wake."""


@dataclass(eq=False)
class ReplicaSlots(Generic[T]):
    """Slots that tasks can take, and who has them. Changed under the scheduler's lock only.

    Attributes:
        index: Position among the pool's replicas.
        total: Tasks it can run at once.
        ready: It has the model and its worker was not given up.
        stalled: Its worker has not moved for too long; it gets nothing until it asks for something.
        free_bytes: Free memory on its device, for placement.
        instance: What its worker runs new tasks on, None for nothing; changed and handed out under the lock.
        running: Tasks its worker took, by id.
        enqueued: Tasks it ever took, by priority.
        wake: Wakes its worker; called outside the lock.
    """

    index: int
    total: int
    ready: bool = False
    stalled: bool = False
    free_bytes: int = 0
    instance: T | None = None
    running: dict[str, Running] = field(default_factory=dict)
    enqueued: Counter[Priority] = field(default_factory=Counter)
    wake: Callable[[], None] = _nobody

    @property
    def serving(self) -> bool:
        """Whether tasks can start here."""
        return self.ready and not self.stalled

    @property
    def busy(self) -> int:
        """Slots in use."""
        return len(self.running)

    @property
    def free(self) -> int:
        """Slots that could be filled now."""
        return max(0, self.total - len(self.running)) if self.serving else 0
