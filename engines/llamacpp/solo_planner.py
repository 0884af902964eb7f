"""Steps of one sequence each, for models whose texts must not depend on what else they do.

What llama.cpp's kernels round a number to depends on how many rows a step has, where a prompt is cut, and what is read
from a cache instead of computed. Here all three follow from the sequence alone: its steps have no rows of others, its
prompt comes in chunks of one size, and its slot is empty before.
"""

from __future__ import annotations

from typing import Any

from engines.api import Beside
from engines.llamacpp.batch import Chunk
from engines.llamacpp.planner import Planner, Step


class SoloPlanner(Planner):
    """The slots take turns, in their order: each one's next token or chunk of its prompt.

    Args:
        chunk: Prompt tokens in a step, as far as the context has rows for them.
        others: As `Planner` takes them.
    """

    def __init__(self, *args: Any, chunk: int, **others: Any) -> None:
        super().__init__(*args, **others)
        self._chunk = min(chunk, self._context.n_rows)
        self._last = -1  # slot that had the last turn

    def prepare(self, beside: Beside) -> Step | None:
        """As `Planner.prepare`."""
        running = [(slot, slot.run) for slot in self._slots if slot.run is not None]
        if not running:
            return None
        slot, run = min(running, key=lambda one: (one[0].index - self._last - 1) % len(self._slots))
        self._last = slot.index
        left, position = len(run.sequence.tokens) - len(slot.cached), len(slot.cached)
        rows = 1 if run.decoding else min(left, self._chunk)
        done = run.decoding or rows == left
        return self._compose([Chunk(slot.index, rows, outputs=int(done))], position=0 if run.decoding else position)
