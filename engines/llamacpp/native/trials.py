"""What a context is tried with before it serves: whether steps work, and whether more threads are worth waking.

Each trial leaves the context empty. What it computed stays in memory, as that of any sequence that has ended.
"""

from __future__ import annotations

import time

import numpy as np

from engines.errors import DecodeFailed
from engines.llamacpp.native.context import NativeContext

LONG_STEP_S = 0.001
"""A step that takes as long is not made faster by leaving threads asleep."""
CERTAINLY_LONG_S = 0.03
"""A step that takes as long is not a short one that was held up; with a large model, four of them take seconds."""
WORTH_WAKING = 1.5
"""How much faster than one thread all have to be: beside short steps an event loop needs a core of its own."""


def try_step(context: NativeContext, token: int, rows: int = 1, *, slots: int = 1) -> None:
    """Decode a token ``rows`` times in each of the first slots: shows that a step works.

    It pages in the weights, and a GPU takes the memory that such a step needs.

    Raises:
        DecodeFailed: It does not.
    """
    n = rows * slots
    context.token[:n], context.pos[:n] = token, np.tile(np.arange(rows), slots)
    context.seq[:n], context.output[:n] = np.arange(n) // rows, np.arange(1, n + 1) % rows == 0
    context.decode(n)
    if not np.isfinite(context.logits(slots)).all():
        raise DecodeFailed("the model computes NaN or infinity instead of logits; its file may be damaged")
    context.clear(wipe=False)


def try_tasks(context: NativeContext, token: int, slots: int) -> None:
    """Decode as tasks do that come and go: in up to three slots, of unequal lengths, each of which ends once.

    Raises:
        DecodeFailed: A step does not work.
    """
    length = [0] * slots
    for rows in ((3, 1, 2), (1, 0, 1), (1, 2, 1), (0, 1, 1), (2, 1, 0)):
        n = 0
        for slot, count in enumerate(rows[:slots]):
            if not count:
                context.clear_slot(slot)
                length[slot] = 0
            for left in reversed(range(count)):
                context.token[n], context.pos[n], context.seq[n] = token, length[slot], slot
                context.output[n] = left == 0
                length[slot] += 1
                n += 1
        if n:
            context.decode(n)
    context.clear(wipe=False)


def choose_threads(context: NativeContext, n_slots: int) -> None:
    """Find out for small steps whether waking the other threads is worth it; with tiny models it is not."""
    lone_rows = 0
    for rows in (1, n_slots) if context.n_threads > 1 else ():
        if _is_long(context, rows):
            break
        pairs = [(_step_s(context, rows, lone_rows=0), _step_s(context, rows, lone_rows=rows)) for _ in range(8)]
        together_s, alone_s = map(min, zip(*pairs, strict=True))
        if alone_s > together_s * WORTH_WAKING:
            break
        lone_rows = rows
    context.lone_rows = lone_rows


def _is_long(context: NativeContext, rows: int) -> bool:
    """Whether such a step takes long at its best; one that takes very long is enough to know."""
    for _ in range(4):
        seconds = _step_s(context, rows, lone_rows=0)
        if seconds <= LONG_STEP_S or seconds > CERTAINLY_LONG_S:
            return seconds > LONG_STEP_S
    return True


def _step_s(context: NativeContext, rows: int, *, lone_rows: int) -> float:
    """Seconds of a step with one row in each slot, of a token that was decoded before."""
    context.lone_rows = lone_rows
    context.token[:rows], context.pos[:rows], context.output[:rows] = context.token[0], 0, 1
    context.seq[:rows] = np.arange(rows)
    began_s = time.perf_counter()
    context.decode(rows)
    seconds = time.perf_counter() - began_s
    context.clear(wipe=False)
    return seconds
