"""Copies between slots: the same text whichever way they are made, and a price that is measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from engines.api import ModelSpec
from engines.llamacpp.copying import Copier, CopyCost
from engines.llamacpp.native.context import HELD_COST, NativeContext
from engines.llamacpp.reuse import Reuse
from engines.llamacpp.slots import MIN_COPY
from engines.llamacpp.step_cost import StepCost
from testkit.builders import Clock
from tests.engines.support import count_rows, exact, loaded, run, sequence, text_of

CONVERSATION = tuple(5 + n % 90 for n in range(1000))
OTHER = (*CONVERSATION[:520], *(300 + n % 50 for n in range(30)))


def spec(path: Path, *, ctx: int, **options: Any) -> ModelSpec:
    return replace(exact(path, slots=4, ctx=ctx, batch=512), **options)


WAYS = {"whole slots": 1200, "what is held": 4096}


def cold(path: Path, tokens: tuple[int, ...], **options: Any) -> str:
    with loaded(spec(path, ctx=1200, **options)) as model:
        return text_of(model, tokens)


@pytest.mark.parametrize("ctx", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("flash_attn", ["on", "off"])
def test_a_conversation_survives_another_one_that_begins_alike(
    flash_attn: str, ctx: int, tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one took its slot, with three empty, and its next turn computed 507 tokens."""
    next_turn = (*CONVERSATION, 400, 401)
    alone = [cold(tiny_model_path, tokens, flash_attn=flash_attn) for tokens in (OTHER, next_turn)]
    with loaded(spec(tiny_model_path, ctx=ctx, flash_attn=flash_attn)) as model:
        text_of(model, CONVERSATION, 1)
        rows = count_rows(model, monkeypatch)
        assert [text_of(model, OTHER), text_of(model, next_turn)] == alone
        assert (rows[0], rows[16]) == (30, 2)


def test_a_cache_of_16_bits_is_copied_bit_for_bit_either_way(tiny_model_path: Path) -> None:
    texts = []
    for ctx in WAYS.values():
        with loaded(spec(tiny_model_path, ctx=ctx, cache_type_k="f16", cache_type_v="f16")) as model:
            text_of(model, CONVERSATION, 1)
            texts.append(text_of(model, OTHER, 60))
    assert texts[0] == texts[1]


def ways(context: NativeContext, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, bool]]:
    """The copies from now on: source, target, whether it was made at once."""
    made: list[tuple[int, int, bool]] = []
    copy = context.copy_slot

    def noted(source: int, target: int, tokens: int) -> bool:
        made.append((source, target, copy(source, target, tokens)))
        return made[-1][2]

    monkeypatch.setattr(context, "copy_slot", noted)
    return made


def test_little_is_copied_by_itself_and_much_with_its_slot(
    tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for ctx, at_once in ((HELD_COST * 1000 - 1, False), (HELD_COST * 1000, True)):
        with loaded(spec(tiny_model_path, ctx=ctx)) as model:
            text_of(model, CONVERSATION, 1)
            made = ways(model._context, monkeypatch)
            model.admit(sequence(OTHER))
            assert made == [(0, 1, at_once)]


def test_a_sliding_window_is_copied_with_its_slot(tiny_swa_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state of a sequence leaves out what its window has left behind, and the copy could not be cut back."""
    with loaded(spec(tiny_swa_path, ctx=4096)) as model:
        text_of(model, CONVERSATION, 1)
        made = ways(model._context, monkeypatch)
        assert text_of(model, OTHER) == cold(tiny_swa_path, OTHER)
        assert made == [(0, 1, False)]


def test_copies_that_follow_one_another_before_a_step_see_each_other(
    tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is made by the next decode: a second one that was made at once would copy what was there before."""
    with loaded(spec(tiny_model_path, ctx=HELD_COST * 1000)) as model:
        text_of(model, (*CONVERSATION, 7), 1)
        made = ways(model._context, monkeypatch)
        model._prefixes._take(list(CONVERSATION), Reuse(1, 900, copy_from=0))
        model._prefixes._take(list(CONVERSATION), Reuse(2, 800, copy_from=1))
        assert made == [(0, 1, False), (1, 2, False)]
        assert len(model._slots[1].cached) * HELD_COST < HELD_COST * 1000, "it would have been made at once"
        model._slots[0].cached, model._slots[1].cached = [], []
        assert text_of(model, OTHER) == cold(tiny_model_path, OTHER)


def test_where_states_are_refused_whole_slots_are_copied(
    tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama_cpp.llama_state_seq_set_data", lambda *arguments: 0)
    with loaded(spec(tiny_model_path, ctx=4096)) as model:
        text_of(model, CONVERSATION, 1)
        made = ways(model._context, monkeypatch)
        assert text_of(model, OTHER) == cold(tiny_model_path, OTHER)
        assert made == [(0, 1, False)]
        assert not model._context.copies_held(1)


def test_a_copy_that_would_pass_through_too_much_memory_does_not(
    tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engines.llamacpp.native.context.COPY_BYTES", 1000)
    with loaded(spec(tiny_model_path, ctx=4096)) as model:
        run(model, sequence(CONVERSATION, 1))
        made = ways(model._context, monkeypatch)
        model.admit(sequence(OTHER))
        assert made == [(0, 1, False)]
        assert model._context.copies_held(1)


def test_each_way_has_a_price_of_its_own() -> None:
    cost = CopyCost()
    assert cost.seconds(1000, whole=False) == cost.seconds(1000, whole=True) == 0
    cost.observe(100, 0.01, whole=False)
    cost.observe(0, 0.5, whole=True)
    assert cost.seconds(1000, whole=False) == pytest.approx(0.1)
    assert cost.seconds(1000, whole=True) == 0.5
    cost.observe(0, 1.0, whole=True)
    assert cost.seconds(1, whole=True) == pytest.approx(0.6)


def copier(clock: Clock, steps: StepCost, *, takes_s: float, held: bool) -> Copier:
    """Of a context that copies in so many seconds, at once or in the next step."""

    def copy(source: int, target: int, tokens: int) -> bool:
        clock.now += takes_s * held
        return held

    context = SimpleNamespace(copy_slot=copy, copies_held=lambda tokens: held)
    return Copier(cast("NativeContext", context), steps, clock)


def test_a_copy_must_save_as_much_as_it_takes() -> None:
    """2 ms a token, 20 ms a step, and 0.4 s for a copy of 1,000 tokens."""
    clock, steps = Clock(), StepCost(0.1, 512, lone_s=0.5)
    made = copier(clock, steps, takes_s=0.4, held=True)
    assert (made.worth(1000), made.payback(1000)) == (MIN_COPY, 0)
    steps.observe(decode_rows=1, prefill_tokens=0, seconds=0.02)
    steps.observe(decode_rows=1, prefill_tokens=10, seconds=0.04)
    made.copy(0, 1, 1000)
    assert made.take_queued() == 0
    assert (made.worth(1000), made.payback(1000)) == (200, 20)
    assert (made.worth(100), made.payback(100)) == (MIN_COPY, 2)


def test_copies_that_a_step_makes_cost_what_it_takes_longer() -> None:
    clock, steps = Clock(), StepCost(0.1, 512, lone_s=0.5)
    made = copier(clock, steps, takes_s=0.0, held=False)
    steps.observe(decode_rows=1, prefill_tokens=0, seconds=0.02)
    made.copy(0, 1, 10)
    made.copy(1, 2, 10)
    assert (made.take_queued(), made.take_queued()) == (2, 0)
    made.queued_took(2, 0.2)
    assert made.payback(1) == made.payback(5000) == 5


def test_a_step_with_a_copy_is_not_learnt_as_slow_tokens(tiny_model_path: Path) -> None:
    """A copy of 86 ms beside a step of 7 made chunks small for a while."""
    clock = Clock()
    with loaded(spec(tiny_model_path, ctx=1200)) as model:
        model._clock = model._copier._clock = clock
        context = model._context
        decode = context.decode

        def slowly(n_rows: int) -> None:
            clock.now += 0.001 * n_rows + 10.0 * bool(context._queued)
            decode(n_rows)

        context.decode = slowly  # type: ignore[method-assign]  # the same, on a machine where copies take long
        text_of(model, CONVERSATION, 4)
        cost = model._planner._cost
        before = cost.token_s(), cost.stream_s()
        text_of(model, OTHER, 4)
        assert (cost.token_s(), cost.stream_s()) == pytest.approx(before)
        assert model._copier.worth(1000) > 9_000
        rows = len(model._slots[1].cached)
        model.admit(sequence((*CONVERSATION[:700], 5, 5, 5)))
        assert len(model._slots[1].cached) == rows, "no copy is worth so much: it goes on where it shares the most"
