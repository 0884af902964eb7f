"""Which rows the next step has: functions of plain values.

llama.cpp computes rows of neighbouring slots in one pass, the same number of rows for each slot; the remaining rows
take further passes. A pass reads all weights, and a row adds little: that is why streams are in the order of their
slots, and why slots in use are kept side by side (`reuse.find_reuse`, `compaction`). A pass reads as many cells of
every slot as the fullest one has: that is why a prompt gets a pass of its own, before the streams.

Because of that pass, a prompt gains nothing from sharing a step with another prompt, and the streams would wait for
both, so most steps have rows of only one prompt. The tile, which makes larger chunks cheaper, also covers rows of one
prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

MIN_CHUNK = 16
"""Prompt tokens in a step even where they do not fit: fewer cost a step nearly as much and starve the prompt."""

TILE = 64
"""Rows of a prompt from which on llama.cpp's flash attention on a CPU works in tiles; of fewer, each costs up to twice
as much, but it makes no difference how many they are."""

GRAIN = 32
"""Chunks larger than a tile are a multiple of this many rows, because llama.cpp keeps the graph for equal steps."""

WORTH_A_TILE = 24
"""If this many tokens fit, a whole tile is taken: it takes little longer than twice as many tokens would."""

PATIENCE = 2
"""The oldest prompt lets others pass with this many rows for each of its last chunk's: it keeps a third of the time."""

PATIENCE_WITH_URGENT = 8
"""The same if the oldest is not urgent and the others are: it keeps a ninth."""


class Demand(NamedTuple):
    """What one running slot could do next.

    Attributes:
        slot: Its index.
        tokens: Prompt tokens still to prefill; 0 for a slot that decodes (and so needs one row).
        urgent: Goes before those that are not.
        order: Admission order.
        chunk: Rows of the last chunk it got; 0 before the first.
        passed: Rows that other prompts got since.
        last_alone: Whether its last token has to come in a step of its own.
        guesses: Rows besides that of a slot that decodes.
    """

    slot: int
    tokens: int
    urgent: bool
    order: int
    chunk: int = 0
    passed: int = 0
    last_alone: bool = False
    guesses: int = 0

    @property
    def at_once(self) -> int:
        """Tokens that a step may have at most."""
        return self.tokens - 1 if self.last_alone and self.tokens > 1 else self.tokens


class Budget(NamedTuple):
    """How many prompt tokens a step may have.

    Attributes:
        fit: As many as there is time for.
        light: As many as add little to the step.
        watched: Whether somebody waits for the next token of a stream in it or beside it.
        overdrawn: Whether ``fit`` takes more than that time: it is the least with which a prompt gets ahead.
    """

    fit: int
    light: int
    watched: bool
    overdrawn: bool = False


NO_PROMPTS = Budget(0, 0, watched=True)
"""For a step of streams alone."""


class Chunk(NamedTuple):
    """Rows of one slot in the next pass.

    Attributes:
        slot: Its index.
        rows: How many, at least 1.
        outputs: The last so many rows' logits are needed, to sample from: of a prompt one or none, of a stream all.
    """

    slot: int
    rows: int
    outputs: int


def plan(demands: Sequence[Demand], *, budget: Budget = NO_PROMPTS, max_rows: int) -> list[Chunk]:
    """Every decoding slot gets its row; the prompt whose turn it is gets a chunk; in order for one step.

    Further prompts come along only where that adds little: as far as the step stays light, and whole short ones also
    beside no stream that is watched.

    Args:
        demands: The running slots, at most ``max_rows`` of them with their guesses.
        budget: For the prompts. A chunk that ends its prompt may have a quarter more, and a tile as many as it has.
        max_rows: Most rows in all.
    """
    chunks = [Chunk(d.slot, 1 + d.guesses, outputs=1 + d.guesses) for d in demands if d.tokens == 0]
    room = max_rows - sum(chunk.rows for chunk in chunks)
    taken = 0
    for demand in in_turn(demands):
        rows = min(_chunk(demand, budget), room - taken)
        if taken:
            rows = _along(demand, budget, rows=rows, taken=taken)
        if rows <= 0:
            break
        chunks.append(Chunk(demand.slot, rows, outputs=int(rows == demand.tokens)))
        taken += rows
    return _in_passes(chunks)


def in_turn(demands: Iterable[Demand]) -> list[Demand]:
    """The prompts in the order in which they should be read.

    Urgent ones first, of these the one with the least to read: a short prompt does not wait for a long one, which loses
    no more by it than the short one's own time. So that nobody starves, the oldest prompt goes first when others have
    passed it for long enough (`PATIENCE`). Every prompt becomes the oldest in the end.
    """
    prompts = sorted((d for d in demands if d.tokens), key=lambda d: (not d.urgent, d.tokens, d.order))
    for urgent in (True, False):
        oldest = min((d for d in prompts if d.urgent == urgent), key=lambda d: d.order, default=None)
        patience = PATIENCE_WITH_URGENT if prompts and prompts[0].urgent > urgent else PATIENCE
        if oldest is not None and oldest.passed >= patience * (oldest.chunk or TILE):
            prompts.remove(oldest)
            prompts.insert(0, oldest)
    return prompts


def _chunk(demand: Demand, budget: Budget) -> int:
    """Rows that a prompt gets in a step of its own.

    Less than a tile costs the same by the row in any pieces, so that a short prompt beside watched streams is read in
    light ones. The end of a long one is not: the streams had steps of that length before. Where not even a tile fits,
    an end below a tile is read with the tile before it: by itself it would take longer than that tile.
    """
    short = demand.tokens < TILE and demand.chunk < TILE
    rows = min(budget.light, budget.fit) if short and budget.watched else budget.fit
    if demand.tokens >= TILE and rows >= WORTH_A_TILE:
        rows = min(max(TILE, rows // GRAIN * GRAIN), demand.at_once)
        if budget.overdrawn and demand.at_once < rows + TILE:
            return demand.at_once
    return demand.at_once if demand.at_once <= rows + rows // 4 else rows


def _along(demand: Demand, budget: Budget, *, rows: int, taken: int) -> int:
    """Rows that a prompt gets in another one's step: all of a short one, or a tile at least."""
    whole = rows == demand.tokens
    if whole and demand.tokens < TILE and not budget.watched:
        return rows if taken + rows <= budget.fit else 0
    rows = min(rows, budget.light - taken)
    return rows if rows == demand.tokens or rows >= TILE else 0


def _in_passes(chunks: Sequence[Chunk]) -> list[Chunk]:
    """Prompts before streams, or after them where the first stream's slot is next to the last prompt's; by slot."""
    prompts = sorted(chunk for chunk in chunks if chunk.rows > max(1, chunk.outputs))
    streams = sorted(chunk for chunk in chunks if chunk.rows <= max(1, chunk.outputs))
    if prompts and streams and prompts[-1].slot + 1 == streams[0].slot:
        return streams + prompts
    return prompts + streams
