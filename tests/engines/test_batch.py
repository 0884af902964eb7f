"""The plan of one step."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from engines.llamacpp.batch import Chunk, Demand, first_prompt, plan


def decoding(slot: int) -> Demand:
    return Demand(slot, 0, urgent=True, order=slot)


def prompt(slot: int, tokens: int, *, urgent: bool = True, order: int | None = None) -> Demand:
    return Demand(slot, tokens, urgent=urgent, order=slot if order is None else order)


def test_a_decoding_slot_gets_its_row_before_prompts() -> None:
    assert plan([prompt(0, 9), decoding(1)], prefill_budget=4, max_rows=8) == [Chunk(1, 1, True), Chunk(0, 4, False)]


def test_decoding_rows_come_off_the_rows_and_not_off_the_budget() -> None:
    assert plan([decoding(0), prompt(1, 9)], prefill_budget=4, max_rows=5)[0].rows == 4
    assert plan([decoding(0), prompt(1, 9)], prefill_budget=4, max_rows=3)[0].rows == 2


def test_one_prompt_is_finished_before_the_next_begins() -> None:
    chunks = plan([prompt(0, 5), prompt(1, 5)], prefill_budget=8, max_rows=8)
    assert chunks == [Chunk(0, 5, True), Chunk(1, 3, False)]


def test_prompts_go_in_the_order_of_admission() -> None:
    chunks = plan([prompt(0, 5, order=2), prompt(1, 5, order=1)], prefill_budget=5, max_rows=8)
    assert chunks == [Chunk(1, 5, True)]


def test_an_urgent_prompt_overtakes() -> None:
    chunks = plan([prompt(0, 5, urgent=False), prompt(1, 5)], prefill_budget=5, max_rows=8)
    assert chunks == [Chunk(1, 5, True)]


def test_nothing_to_do_is_an_empty_plan() -> None:
    assert plan([], prefill_budget=8, max_rows=8) == []


@st.composite
def situations(draw: st.DrawFn) -> tuple[list[Demand], int, int]:
    wants = draw(st.lists(st.tuples(st.integers(0, 20), st.booleans()), max_size=8))
    orders = draw(st.permutations(range(len(wants))))
    demands = [Demand(i, tokens, urgent, orders[i]) for i, (tokens, urgent) in enumerate(wants)]
    return demands, draw(st.integers(1, 40)), draw(st.integers(max(1, len(demands)), 40))


@given(situations())
def test_any_plan_keeps_to_its_rows_and_serves_every_stream(situation: tuple[list[Demand], int, int]) -> None:
    demands, budget, max_rows = situation
    chunks = plan(demands, prefill_budget=budget, max_rows=max_rows)
    wanted = {d.slot: d.tokens for d in demands}
    prefill = [c for c in chunks if wanted[c.slot]]
    assert len({c.slot for c in chunks}) == len(chunks)
    assert sum(c.rows for c in chunks) <= max_rows
    assert sum(c.rows for c in prefill) <= budget
    assert [c for c in chunks if not wanted[c.slot]] == [Chunk(d.slot, 1, True) for d in demands if not d.tokens]
    for chunk in prefill:
        assert 1 <= chunk.rows <= wanted[chunk.slot]
        assert chunk.output == (chunk.rows == wanted[chunk.slot])


@given(situations())
def test_any_plan_makes_progress(situation: tuple[list[Demand], int, int]) -> None:
    demands, budget, max_rows = situation
    chunks = plan(demands, prefill_budget=budget, max_rows=max_rows)
    assert bool(chunks) == bool(demands)
    prompts = sum(d.tokens for d in demands)
    rows = sum(c.rows for c in chunks) - sum(not d.tokens for d in demands)
    assert rows == min(prompts, budget, max_rows - sum(not d.tokens for d in demands))


@given(situations())
def test_any_prompt_left_out_comes_after_all_that_were_taken(situation: tuple[list[Demand], int, int]) -> None:
    demands, budget, max_rows = situation
    counts = {c.slot: c.rows for c in plan(demands, prefill_budget=budget, max_rows=max_rows)}
    turn = [d for d in sorted(demands, key=lambda d: (not d.urgent, d.order)) if d.tokens]
    complete = [counts.get(d.slot) == d.tokens for d in turn]
    assert complete == sorted(complete, reverse=True)  # the finished ones, then
    assert sum(0 < counts.get(d.slot, 0) < d.tokens for d in turn) <= 1  # at most one begun, then those not begun
    begun = [d.slot in counts for d in turn]
    assert begun == sorted(begun, reverse=True)


def test_prompts_and_streams_are_in_the_order_of_their_slots_prompts_first() -> None:
    demands = [decoding(1), decoding(0), prompt(3, 9, urgent=False), prompt(2, 2)]
    chunks = plan(demands, prefill_budget=8, max_rows=10)
    assert chunks == [Chunk(2, 2, True), Chunk(3, 6, False), Chunk(0, 1, True), Chunk(1, 1, True)]


def test_streams_come_first_where_the_first_one_would_continue_the_prompts() -> None:
    chunks = plan([decoding(3), prompt(1, 9, urgent=False), prompt(2, 2)], prefill_budget=8, max_rows=9)
    assert chunks == [Chunk(3, 1, True), Chunk(1, 6, False), Chunk(2, 2, True)]


@given(situations())
def test_no_prompt_is_next_to_a_stream(situation: tuple[list[Demand], int, int]) -> None:
    demands, budget, max_rows = situation
    chunks = plan(demands, prefill_budget=budget, max_rows=max_rows)
    for left, right in itertools.pairwise(chunks):
        assert (left.rows == 1) == (right.rows == 1) or right.slot != left.slot + 1


def test_the_first_prompt_is_the_one_that_a_plan_serves_first() -> None:
    assert first_prompt([decoding(0)]) is None
    assert first_prompt([prompt(0, 5, urgent=False), decoding(1), prompt(2, 5, order=9), prompt(3, 5, order=4)]) == 3
