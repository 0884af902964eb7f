"""Which rows the next step has: functions of plain values.

llama.cpp computes the rows of a step in one pass where each slot's cache is next to the previous row's, and in one more
for each gap. A pass reads all weights, a row adds little: that is why rows are in the order of their slots, why small
gaps are filled with rows that nobody needs (`bridged`), and why slots are given away side by side (`slots.find_reuse`).
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import NamedTuple

MAX_GAP = 2
"""Most rows that may be spent on joining two passes."""


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
        bridge: Whether it is there to join passes, and forgotten after the step.
    """

    slot: int
    rows: int
    output: bool
    bridge: bool = False


def plan(demands: Sequence[Demand], *, prefill_budget: int, max_rows: int) -> list[Chunk]:
    """Every decoding slot gets its row; the rest of the rows go to prompts, one after the other; by slot.

    One prompt at a time, urgent ones first, then by admission: that ends each as early as possible and delays nobody
    more than sharing the rows out would.

    Args:
        demands: The running slots, at most ``max_rows`` of them.
        prefill_budget: Most prompt tokens in this pass.
        max_rows: Most rows in all.
    """
    chunks = [Chunk(d.slot, 1, output=True) for d in demands if d.tokens == 0]
    room = min(prefill_budget, max_rows - len(chunks))
    for demand in sorted((d for d in demands if d.tokens), key=_turn):
        if room <= 0:
            break
        count = min(demand.tokens, room)
        chunks.append(Chunk(demand.slot, count, output=count == demand.tokens))
        room -= count
    return sorted(chunks)


def first_prompt(demands: Sequence[Demand]) -> int | None:
    """The slot whose prompt `plan` takes first; None if none is to be prefilled."""
    first = min((d for d in demands if d.tokens), key=_turn, default=None)
    return None if first is None else first.slot


def _turn(demand: Demand) -> tuple[bool, int]:
    return not demand.urgent, demand.order


def bridged(chunks: Sequence[Chunk], idle: Container[int]) -> list[Chunk]:
    """The chunks of a plan with one more row in each slot of their small gaps, if those can take one.

    Args:
        chunks: In the order of their slots.
        idle: Slots that can.
    """
    joined = list(chunks[:1])
    for chunk in chunks[1:]:
        gap = range(joined[-1].slot + 1, chunk.slot)
        if len(gap) <= MAX_GAP and all(slot in idle for slot in gap):
            joined += [Chunk(slot, 1, output=False, bridge=True) for slot in gap]
        joined.append(chunk)
    return joined
