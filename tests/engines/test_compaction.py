"""Working slots come to lie side by side, and nothing that matters is lost on the way."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines import api
from engines.llamacpp.compaction import WORTH_MOVING, Move, carry_out, find_move
from engines.llamacpp.model import LlamaModel
from engines.llamacpp.slots import MIN_COPY, Run, Slot
from engines.llamacpp.text import OutputText
from testkit import tiny_gguf
from tests.engines.support import PROMPTS, exact, loaded, sequence, text_of, tokens_of


def busy(index: int, *, cached: int = 5, left: int = WORTH_MOVING) -> Slot:
    run = Run(api.Sequence(f"run {index}", [1], left), 1, OutputText(), None)
    return Slot(index, [index] * cached, run, used=index)


def idle(index: int, *, cached: int = 0, used: int = 0) -> Slot:
    return Slot(index, [index] * cached, None, used)


def moved(slots: Sequence[Slot], *, payback: int = 0) -> Move | None:
    return find_move(slots, payback=lambda tokens: payback)


def test_neighbours_stay_where_they_are() -> None:
    assert moved([idle(0), busy(1), busy(2), idle(3)]) is None
    assert moved([idle(0), busy(1), idle(2)]) is None
    assert moved([idle(0), idle(1)]) is None


def test_the_farthest_fills_a_hole() -> None:
    assert moved([busy(0), busy(1), idle(2), busy(3), busy(4)]) == Move(4, 2)


def test_who_is_alone_comes_to_the_others() -> None:
    assert moved([busy(0), idle(1), idle(2), busy(3), busy(4)]) == Move(0, 2)


def test_a_sequence_that_ends_soon_stays() -> None:
    assert moved([busy(0), busy(1), idle(2), busy(3, left=WORTH_MOVING - 1)]) is None


def test_a_copy_that_takes_long_to_pay_is_not_made() -> None:
    """A copy may cost as much as many steps with one pass more: 86 ms beside 7 ms, at 32,768 tokens a slot."""
    slots = [busy(0), busy(1), idle(2), busy(3, left=50)]
    assert moved(slots, payback=25) == Move(3, 2)
    assert moved(slots, payback=26) is None


def test_a_cache_in_the_way_is_a_copy_too() -> None:
    slots = [busy(0), busy(1), idle(2, cached=MIN_COPY, used=9), busy(3, left=50), idle(4)]
    assert moved(slots, payback=12) == Move(3, 2, spare=4)
    assert moved(slots, payback=13) is None


def test_a_prompt_that_has_not_begun_costs_no_copy() -> None:
    assert moved([busy(0), idle(1), busy(2, cached=0)], payback=10**6) == Move(2, 1)


def test_what_a_sequence_has_written_counts_as_done() -> None:
    slots = [busy(0), busy(1), idle(2), busy(3)]
    assert slots[3].run is not None
    slots[3].run.tokens_out = 1
    assert moved(slots) is None


def test_a_cache_that_is_in_the_way_replaces_the_oldest() -> None:
    slots = [busy(0), idle(1, cached=MIN_COPY, used=9), busy(2), idle(3, cached=99, used=7), idle(4, cached=99, used=8)]
    assert moved(slots) == Move(2, 1, spare=3)


def test_an_empty_slot_is_the_oldest() -> None:
    slots = [busy(0), idle(1, cached=MIN_COPY, used=9), busy(2), idle(3, cached=1, used=7), idle(4, used=8)]
    assert moved(slots) == Move(2, 1, spare=4)


def test_a_cache_in_the_way_is_lost_if_it_is_the_oldest() -> None:
    assert moved([busy(0), idle(1, cached=MIN_COPY), busy(2)]) == Move(2, 1)


def test_of_two_places_the_one_that_is_not_missed_is_taken() -> None:
    slots = [busy(0), idle(1), idle(2, used=5), busy(3), busy(4), idle(5, used=4)]
    assert moved(slots) == Move(0, 5)


def test_of_several_that_are_apart_the_farthest_comes_first() -> None:
    assert moved([busy(0), busy(1), idle(2), busy(3), idle(4), busy(5)]) == Move(5, 2)


def test_a_few_cached_tokens_are_not_worth_a_copy() -> None:
    slots = [busy(0), idle(1, cached=MIN_COPY - 1, used=9), busy(2), idle(3, cached=99, used=7)]
    assert moved(slots) == Move(2, 1)


def test_a_prompt_that_has_not_begun_changes_places() -> None:
    slots = [busy(0), idle(1, cached=MIN_COPY, used=9), busy(2, cached=0), idle(3)]
    move = moved(slots)
    assert move == Move(2, 1, spare=2)
    carry_out(move, slots)
    assert [slot.run is not None for slot in slots] == [True, True, False, False]
    assert [len(slot.cached) for slot in slots] == [5, 0, MIN_COPY, 0]
    assert slots[2].used == 9


def test_a_slot_that_was_left_is_as_good_as_new() -> None:
    slots = [busy(0), busy(1), idle(2), busy(3)]
    carry_out(Move(3, 2), slots)
    assert slots[3] == Slot(3)
    assert slots[2].used == 3


@st.composite
def some_slots(draw: st.DrawFn) -> list[Slot]:
    slots = []
    for index in range(draw(st.integers(1, 10))):
        cached = draw(st.sampled_from([0, 1, MIN_COPY, 3 * MIN_COPY]))
        if draw(st.booleans()):
            slots.append(busy(index, cached=cached, left=draw(st.integers(WORTH_MOVING, 99))))
        else:
            slots.append(idle(index, cached=cached, used=draw(st.integers(0, 9))))
    return slots


def running(slots: Sequence[Slot]) -> dict[str, list[int]]:
    return {slot.run.sequence.key: slot.cached for slot in slots if slot.run is not None}


@given(some_slots())
def test_moves_end_with_all_that_work_side_by_side(slots: list[Slot]) -> None:
    before = running(slots)
    for _ in range(len(slots)):
        move = moved(slots)
        if move is None:
            break
        assert slots[move.source].run is not None
        assert slots[move.target].run is None
        kept = sorted(slot.cached for slot in slots if slot.run is None)
        carry_out(move, slots)
        assert running(slots) == before  # each with its own cache
        assert [slot.index for slot in slots] == list(range(len(slots)))
        left = [slot.cached for slot in slots if slot.run is None]
        lost = [cached for cached in kept if cached and cached not in left]
        assert len(lost) <= 1
    assert moved(slots) is None
    working = [slot.index for slot in slots if slot.run is not None]
    assert not working or working == list(range(working[0], working[-1] + 1))


@given(some_slots())
def test_of_the_caches_worth_keeping_only_the_oldest_is_lost(slots: list[Slot]) -> None:
    move = moved(slots)
    if move is None:
        return
    free = [slot for slot in slots if slot.run is None]
    oldest = min((slot.used for slot in free if slot.cached), default=0)
    had = [(slot.used, list(slot.cached)) for slot in free if len(slot.cached) >= MIN_COPY]
    carry_out(move, slots)
    has = [slot.cached for slot in slots if slot.run is None]
    assert all(used == oldest for used, cached in had if cached not in has)


@pytest.mark.parametrize("write", [tiny_gguf.write_tiny_llama, tiny_gguf.write_tiny_swa])
def test_text_is_the_same_whoever_moves(write: Callable[[Path], Path], tmp_path: Path) -> None:
    """Six streams of which every other one ends early."""
    path = write(tmp_path / "model.gguf")
    prompts = [tokens_of(path, text) for text in PROMPTS[8:14]]
    lengths = [60, 4, 50, 6, 60, 8]
    with loaded(exact(path, slots=8)) as model:
        alone = []
        for prompt, length in zip(prompts, lengths, strict=True):
            model.reset()
            alone.append(text_of(model, prompt, length))
    with loaded(exact(path, slots=8)) as model:
        for n, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            model.admit(sequence(prompt, length, key=str(n)))
        texts: dict[str, str] = {}
        together = []
        while model.busy:
            for event in model.step():
                texts[event.key] = texts.get(event.key, "") + event.text
            together.append([slot.index for slot in model._slots if slot.run is not None])
        assert [texts[str(n)] for n in range(6)] == alone
        three = [working for working in together if len(working) == 3]
        assert three[-1] == list(range(three[-1][0], three[-1][0] + 3))  # they were in 0, 2 and 4


def working(model: LlamaModel) -> list[int]:
    return [slot.index for slot in model._slots if slot.run is not None]


def test_several_move_one_after_the_other_while_nobody_comes_or_goes(tiny_model_path: Path) -> None:
    tokens = tokens_of(tiny_model_path, PROMPTS[9])
    with loaded(exact(tiny_model_path, slots=7)) as model:
        for n in range(7):
            model.admit(sequence(tokens[n : n + 4], 40 if n % 3 == 0 else 2, key=str(n)))
        while len(working(model)) > 3:
            model.step()
        seen = [working(model)]
        while len(working(model)) == 3:
            if (now := working(model)) != seen[-1]:
                seen.append(now)
            model.step()
        assert seen[-1] == list(range(seen[-1][0], seen[-1][0] + 3))
        assert all(len(set(a) - set(b)) == 1 for a, b in itertools.pairwise(seen))
