"""Which rows the next step has: functions of plain values.

llama.cpp computes the rows of a step in one pass where each slot's cache is next to the previous row's, as many rows of
each slot, and in further passes what is left over. A pass reads all weights, a row adds little: that is why streams are
in the order of their slots, and why those are kept side by side (`slots.find_reuse`, `compaction`). A pass looks at as
many cells of every slot as the fullest one has: that is why a prompt gets a pass of its own, before the streams.
"""

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
    """Every decoding slot gets its row; the rest of the rows go to prompts, one after the other; in order for one step.

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
    return _in_passes(chunks)


def _in_passes(chunks: Sequence[Chunk]) -> list[Chunk]:
    """Prompts before streams, or after them where the first stream's slot is next to the last prompt's; by slot."""
    prompts = sorted(chunk for chunk in chunks if chunk.rows > 1)
    streams = sorted(chunk for chunk in chunks if chunk.rows == 1)
    if prompts and streams and prompts[-1].slot + 1 == streams[0].slot:
        return streams + prompts
    return prompts + streams


def first_prompt(demands: Sequence[Demand]) -> int | None:
    """The slot whose prompt `plan` takes first; None if none is to be prefilled."""
    first = min((d for d in demands if d.tokens), key=_turn, default=None)
    return None if first is None else first.slot


def _turn(demand: Demand) -> tuple[bool, int]:
    return not demand.urgent, demand.order
