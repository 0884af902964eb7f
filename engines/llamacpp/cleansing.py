"""Cleans the memory of a slot in which a model has computed NaN.

Cells that a sequence may not see are masked: multiplied by 0. But NaN times 0 is NaN, so the next sequence in the slot
would inherit it from freed cells, or from a recurrent state that is reset by multiplying it by 0. llama.cpp has two
ways to overwrite a slot's memory: with a copy of another slot, or by clearing all slots at once.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from engines.llamacpp.native.context import NativeContext
from engines.llamacpp.slots import Slot


def cleanse(context: NativeContext, slots: Seq[Slot], damaged: Seq[Slot], *, copies_late: bool) -> None:
    """Leave no NaN where these slots were; whatever the others hold, they keep.

    Args:
        context: Holds the slots' caches.
        slots: All of them.
        damaged: Those with NaN; their ``cached`` is empty already.
        copies_late: Whether a copy is made only when it is continued, as recurrent models do. Which cell a sequence had
            is not known there, so all free ones are overwritten.

    Raises:
        DecodeFailed: The step that takes failed.
    """
    source = max((slot for slot in slots if slot.cached), key=lambda slot: slot.run is not None, default=None)
    if source is None:
        context.clear()
        return
    targets = [slot for slot in slots if not slot.cached] if copies_late else damaged
    for slot in targets:
        context.overwrite_slot(source.index, slot.index)
    if copies_late:
        rows = len(targets)
        context.token[:rows], context.pos[:rows] = source.cached[-1], len(source.cached)
        context.seq[:rows], context.output[:rows] = [slot.index for slot in targets], 1
        context.decode(rows)
    for slot in targets:
        context.clear_slot(slot.index)
