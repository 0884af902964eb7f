"""What may be saved and restored beside a watched stream, on machines and with states of other sizes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from engines.api import Sequence
from engines.llamacpp.native.context import NativeContext
from engines.llamacpp.prefix_index import PrefixIndex
from engines.llamacpp.prompt_cache import PromptCache
from engines.llamacpp.saving import Saver
from engines.llamacpp.slots import Run, Slot
from engines.llamacpp.step_cost import StepCost
from engines.llamacpp.text import OutputText
from testkit.builders import Clock

GIB = 1 << 30
PROMPT = list(range(8000))


class Rig:
    """A saver whose states have a size and copies a speed; a token of a prompt takes 10 ms."""

    def __init__(self, *, state_bytes: int, byte_s: float = 1e-9, stream_s: float = 0.02, watched: bool = True) -> None:
        self.clock, self.copied, self.byte_s = Clock(), 0, byte_s
        self.cost = StepCost(0.1, 512, lone_s=0.5)
        self.cost.observe(decode_rows=1, prefill_tokens=0, seconds=stream_s)
        self.cost.observe(decode_rows=1, prefill_tokens=10, seconds=stream_s + 0.1)
        stream = Run(Sequence("stream", [1], 9, urgent=watched), 1, OutputText(), None, next_token=1)
        self.slots = [Slot(0, list(PROMPT)), Slot(1, [1], stream)]
        index = PrefixIndex(self.slots, cuts=True)
        context: Any = SimpleNamespace(
            state_bytes=lambda slot: state_bytes,
            save_slot=lambda slot, n_bytes: self.copy(n_bytes),
            restore_slot=lambda slot, state: self.copy(state_bytes) is not None,
            is_queued=lambda slot: False,
        )
        self.cache = PromptCache(64 * GIB, index.tree, spare=1)
        self.saver = Saver(
            cast("NativeContext", context), self.cache, index, self.slots, cost=self.cost, limit_s=0.1, clock=self.clock
        )

    def copy(self, n_bytes: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        self.clock.now += n_bytes * self.byte_s
        self.copied += 1
        return np.broadcast_to(np.uint8(0), (n_bytes,))  # takes no memory

    def save(self) -> bool:
        before = self.copied
        self.saver.save(self.slots[0], losing=len(self.slots[0].cached))
        return self.copied > before


def test_gigabytes_are_not_copied_beside_a_watched_stream() -> None:
    """As a slot of an 8B model holds with 16,000 tokens: 2 GiB, 2 s at 1 GB/s."""
    assert not Rig(state_bytes=2 * GIB).save()
    assert Rig(state_bytes=2 * GIB, watched=False).save()


def test_copies_and_the_streams_step_share_the_target() -> None:
    """80 of 100 ms are left beside a step of 20: one copy of 50 ms, not two."""
    rig = Rig(state_bytes=50_000_000)
    assert rig.save()
    rig.slots[0].cached = [7, *PROMPT]
    assert not rig.save()
    rig.saver.next_step()
    assert rig.save()


def test_what_copies_took_the_next_chunk_of_a_prompt_does_not_have() -> None:
    rig = Rig(state_bytes=50_000_000)
    rig.save()
    assert rig.saver.spent_s == pytest.approx(0.05)
    cost = StepCost(0.1, 512, lone_s=0.5)
    cost.observe(decode_rows=1, prefill_tokens=0, seconds=0.02)
    cost.observe(decode_rows=1, prefill_tokens=100, seconds=0.12)
    assert cost.budget(1, watched=True).fit == 80
    assert cost.budget(1, watched=True, spent_s=rig.saver.spent_s).fit == 30


def test_where_streams_alone_take_longer_than_the_target_copies_take_a_quarter_more() -> None:
    """An 8B model on a CPU: 400 ms a step."""
    assert Rig(state_bytes=90_000_000, stream_s=0.4).save()
    assert not Rig(state_bytes=110_000_000, stream_s=0.4).save()


def test_saving_and_restoring_have_prices_of_their_own() -> None:
    """New memory must be mapped before it is written, and a GPU is read more slowly than it is written, or faster."""
    rig = Rig(state_bytes=50_000_000, byte_s=2e-9)
    assert rig.save()
    assert rig.saver._save_s > 1e-9
    assert rig.saver._restore_s == 1e-9
    (entry,) = rig.cache._entries
    assert rig.saver.restore(rig.slots[0], entry)
    assert rig.saver._restore_s == pytest.approx(rig.saver._save_s)
