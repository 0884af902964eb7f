"""Which models serve, and which have served."""

from __future__ import annotations

import enum
from collections import Counter


class ModelState(str, enum.Enum):
    """The two states of a model's life."""

    ACTIVE = "Active"
    RETIRED = "Retired"


class Registry:
    """Which models serve and which have served. Event loop only."""

    def __init__(self) -> None:
        self._pools_of: Counter[str] = Counter()

    def activate(self, model_id: str) -> None:
        """One more pool serves this model."""
        self._pools_of[model_id] += 1

    def retire(self, model_id: str) -> None:
        """One pool no longer serves it. Raises `ValueError` if none did."""
        if self._pools_of[model_id] < 1:
            raise ValueError(f"model {model_id!r} is not active")
        self._pools_of[model_id] -= 1

    def states(self) -> dict[str, ModelState]:
        """Every model that was ever active, in the order of its first time."""
        return {name: ModelState.ACTIVE if pools else ModelState.RETIRED for name, pools in self._pools_of.items()}
