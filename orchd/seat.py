"""A replica as its pool's scheduler sees it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from orchd.schemas import Priority


@dataclass(eq=False)
class Seat:
    """Slots that tasks can take, and who has them. Changed under the scheduler's lock only.

    Attributes:
        index: Position among the pool's replicas.
        slots: Tasks it can run at once.
        ready: It has the model and its worker was not given up.
        stalled: Its worker has not moved for too long; it gets nothing until it asks for something.
        free_bytes: Free memory on its device, for placement.
        claims: Waiting tasks that placement gave one of its slots; its worker takes them at its next step.
        host: What its worker runs new tasks on; opaque here, but changed and handed out under the lock.
        running: Tasks its worker took, with the time.
        enqueued: Tasks it ever took, by priority.
    """

    index: int
    slots: int
    ready: bool = False
    stalled: bool = False
    free_bytes: int = 0
    claims: int = 0
    host: Any = None
    running: dict[str, float] = field(default_factory=dict)
    enqueued: Counter[Priority] = field(default_factory=Counter)

    @property
    def serving(self) -> bool:
        """Whether tasks can start here."""
        return self.ready and not self.stalled

    @property
    def busy(self) -> int:
        """Slots in use or given away."""
        return len(self.running) + self.claims

    @property
    def free(self) -> int:
        """Slots that nobody has and that could be filled now."""
        return max(0, self.slots - self.busy) if self.serving else 0
