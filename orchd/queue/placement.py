"""Which replica a task starts on: the least loaded, by plain numbers. No topology, no tensor splitting."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Load:
    """What placement knows of a replica.

    Attributes:
        index: Position in the pool's list of devices.
        free_slots: Slots that can take a task now; 0 for a replica that is not alive.
        free_bytes: Free memory on its device.
    """

    index: int
    free_slots: int
    free_bytes: int = 0


def least_loaded(loads: Iterable[Load]) -> int | None:
    """Index of the replica with most free slots, then most free memory, then the lowest index; None if none is free."""
    free = [load for load in loads if load.free_slots > 0]
    if not free:
        return None
    return min(free, key=lambda load: (-load.free_slots, -load.free_bytes, load.index)).index
