"""Which rows the next forward pass has: a function of plain values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Demand(NamedTuple):
    """What one running slot could do next.

    Attributes:
        slot: Its index.
        tokens: Prompt tokens still to prefill; 0 for a slot that decodes (and so needs one row).
        urgent: Goes before those that are not.
        order: Admission order.
    """

    slot: int
    tokens: int
    urgent: bool
    order: int


class Chunk(NamedTuple):
    """Rows of one slot in the next pass.

    Attributes:
        slot: Its index.
        rows: How many, at least 1.
        output: Whether the last row's logits are needed, to sample from.
    """

    slot: int
    rows: int
    output: bool


def plan(demands: Sequence[Demand], *, prefill_budget: int, max_rows: int) -> list[Chunk]:
    """Every decoding slot gets its row; the rest of the rows go to prompts, one after the other.

    One prompt at a time, urgent ones first, then by admission: that ends each as early as possible and delays nobody
    more than sharing the rows out would.

    Args:
        demands: The running slots, at most ``max_rows`` of them.
        prefill_budget: Most prompt tokens in this pass.
        max_rows: Most rows in all.
    """
    chunks = [Chunk(d.slot, 1, output=True) for d in demands if d.tokens == 0]
    room = min(prefill_budget, max_rows - len(chunks))
    for demand in sorted((d for d in demands if d.tokens), key=lambda d: (not d.urgent, d.order)):
        if room <= 0:
            break
        count = min(demand.tokens, room)
        chunks.append(Chunk(demand.slot, count, output=count == demand.tokens))
        room -= count
    return chunks
