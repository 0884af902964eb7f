"""Which models serve, and which served last."""

from __future__ import annotations

import enum
from collections import Counter

RETIRED_KEPT = 8
"""How many models that no longer serve are remembered: series of metrics may not grow with every reload."""


class ModelState(str, enum.Enum):
    """The two states of a model's life."""

    ACTIVE = "Active"
    RETIRED = "Retired"


class Registry:
    """Which models serve and which served last. Event loop only."""

    def __init__(self) -> None:
        self._pools_of: Counter[str] = Counter()
        self._retired: dict[str, None] = {}  # an ordered set: longest ago first

    def activate(self, model_id: str) -> None:
        """One more pool serves this model."""
        self._pools_of[model_id] += 1
        self._retired.pop(model_id, None)

    def retire(self, model_id: str) -> None:
        """One pool no longer serves it. Raises `ValueError` if none did."""
        if model_id not in self._pools_of:
            raise ValueError(f"model {model_id!r} is not active")
        self._pools_of[model_id] -= 1
        if not self._pools_of[model_id]:
            del self._pools_of[model_id]
            self._retired[model_id] = None
            if len(self._retired) > RETIRED_KEPT:
                del self._retired[next(iter(self._retired))]

    def states(self) -> dict[str, ModelState]:
        """Every model that serves, and the last `RETIRED_KEPT` that no longer do."""
        return dict.fromkeys(self._retired, ModelState.RETIRED) | dict.fromkeys(self._pools_of, ModelState.ACTIVE)
