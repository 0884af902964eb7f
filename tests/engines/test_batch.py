"""The plan of one step."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.llamacpp.batch import (
    GRAIN,
    MIN_CHUNK,
    PATIENCE,
    PATIENCE_WITH_URGENT,
    TILE,
    WORTH_A_TILE,
    Budget,
    Chunk,
    Demand,
    in_turn,
    plan,
)


def decoding(slot: int) -> Demand:
    return Demand(slot, 0, urgent=True, order=slot)


def prompt(
    slot: int, tokens: int, *, urgent: bool = True, order: int | None = None, chunk: int = 0, passed: int = 0
) -> Demand:
    return Demand(slot, tokens, urgent, slot if order is None else order, chunk, passed)


@pytest.mark.parametrize(
    ("tokens", "chunks"),
    [(60, [60]), (64, [64]), (101, [101]), (127, [127]), (128, [64, 64]), (129, [64, 65]), (229, [64, 64, 101])],
)
def test_where_no_tile_fits_a_prompt_does_not_end_below_one(tokens: int, chunks: list[int]) -> None:
    read = []
    while tokens:
        (chunk,) = plan([prompt(0, tokens, chunk=TILE)], budget=Budget(TILE, 4, True, overdrawn=True), max_rows=512)
        read.append(chunk.rows)
        tokens -= chunk.rows
    assert read == chunks


def planned(*demands: Demand, fit: int, light: int = MIN_CHUNK, watched: bool = True, room: int = 512) -> list[Chunk]:
    return plan(demands, budget=Budget(fit, light, watched), max_rows=room)


def rows(*demands: Demand, fit: int, light: int = MIN_CHUNK, watched: bool = True, room: int = 512) -> dict[int, int]:
    """Of the prompts, by slot."""
    chunks = planned(*demands, fit=fit, light=light, watched=watched, room=room)
    return {chunk.slot: chunk.rows for chunk in chunks if any(d.slot == chunk.slot and d.tokens for d in demands)}


def test_a_decoding_slot_gets_its_row_before_prompts() -> None:
    assert planned(prompt(0, 9), decoding(1), fit=4) == [Chunk(1, 1, True), Chunk(0, 4, False)]


def test_decoding_rows_come_off_the_rows_and_not_off_the_budget() -> None:
    assert rows(decoding(0), prompt(1, 9), fit=4, room=5) == {1: 4}
    assert rows(decoding(0), prompt(1, 9), fit=4, room=3) == {1: 2}


def test_nothing_to_do_is_an_empty_plan() -> None:
    assert planned(fit=8) == []


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    """A prompt of 4,930 tokens, then one of a word: that one waited for all of the first."""
    assert rows(prompt(0, 4900, chunk=64), prompt(1, 5), fit=100) == {1: 5}


def test_of_prompts_with_as_much_to_read_the_older_one_goes_first() -> None:
    assert rows(prompt(0, 300, order=2), prompt(1, 300, order=1), fit=100) == {1: 96}


def test_an_urgent_prompt_overtakes() -> None:
    assert rows(prompt(0, 5, urgent=False), prompt(1, 400), fit=100) == {1: 96}


def test_the_oldest_prompt_keeps_a_third_of_the_time() -> None:
    long, short = prompt(0, 4900, chunk=96, passed=PATIENCE * 96), prompt(1, 30)
    assert rows(long, short, fit=100) == {0: 96}
    assert rows(long._replace(passed=PATIENCE * 96 - 1), short, fit=100) == {1: 16}


def test_a_prompt_that_has_nothing_yet_lets_short_ones_pass_for_two_tiles() -> None:
    long, short = prompt(0, 4900, passed=PATIENCE * TILE - 1), prompt(1, 30)
    assert rows(long, short, fit=100) == {1: 16}
    assert rows(long._replace(passed=PATIENCE * TILE), short, fit=100) == {0: 96}


def test_a_nightly_job_keeps_a_ninth_beside_people() -> None:
    job, person = prompt(0, 4900, urgent=False, chunk=96, passed=PATIENCE_WITH_URGENT * 96), prompt(1, 400)
    assert rows(job, person, fit=100) == {0: 96}
    assert rows(job._replace(passed=job.passed - 1), person, fit=100) == {1: 96}


def test_a_short_prompt_beside_watched_streams_is_read_in_light_pieces() -> None:
    """Two of 30 tokens in one step held the streams up for 0.2 s."""
    assert rows(decoding(0), prompt(1, 30), prompt(2, 30), fit=100, light=16) == {1: 16}


def test_beside_streams_that_nobody_watches_short_prompts_share_a_step() -> None:
    short = [prompt(n, 30 + n) for n in range(4)]
    assert rows(*short, fit=100, watched=False) == {0: 30, 1: 31, 2: 32}
    assert rows(*short, fit=500, watched=False) == {0: 30, 1: 31, 2: 32, 3: 33}


def test_a_long_prompt_does_not_come_along_with_a_short_one() -> None:
    assert rows(prompt(0, 900, chunk=64), prompt(1, 30), fit=500, watched=False) == {1: 30}


def test_where_that_adds_little_a_step_is_filled() -> None:
    prompts = [prompt(0, 90), prompt(1, 200), prompt(2, 900)]
    assert rows(*prompts, fit=512, light=400) == {0: 90, 1: 200, 2: 110}
    assert rows(*prompts, fit=512, light=350) == {0: 90, 1: 200}, "what is left is less than a tile"


def test_the_end_of_a_long_prompt_is_not_cut_into_light_pieces() -> None:
    assert rows(decoding(0), prompt(1, 40, chunk=64), fit=64, light=16) == {1: 40}


def test_a_tile_is_taken_from_a_certain_part_of_it_on_if_it_is_of_one_prompt() -> None:
    assert rows(prompt(0, 500), fit=WORTH_A_TILE) == {0: TILE}
    assert rows(prompt(0, 500), fit=WORTH_A_TILE - 1) == {0: WORTH_A_TILE - 1}
    assert rows(prompt(0, 50, chunk=64), prompt(1, 51, chunk=64), fit=WORTH_A_TILE) == {0: WORTH_A_TILE}


def test_of_more_than_a_tile_whole_grains_are_taken() -> None:
    assert [rows(prompt(0, 500), fit=fit)[0] for fit in (TILE, TILE + GRAIN - 1, TILE + GRAIN)] == [64, 64, 96]


def test_a_prompt_is_ended_where_a_quarter_more_does_it() -> None:
    assert rows(prompt(0, 125), fit=100) == {0: 96}
    assert rows(prompt(0, 120), fit=100) == {0: 120}
    assert rows(decoding(1), prompt(0, 20), fit=100, light=16) == {0: 20}


@st.composite
def situations(draw: st.DrawFn) -> tuple[list[Demand], Budget, int]:
    wants = draw(
        st.lists(
            st.tuples(
                st.one_of(st.integers(0, 20), st.integers(0, 900)),
                st.booleans(),
                st.integers(0, 300),
                st.integers(0, 900),
            ),
            max_size=8,
        )
    )
    orders = draw(st.permutations(range(len(wants))))
    demands = [
        Demand(i, tokens, urgent, orders[i], chunk, passed) for i, (tokens, urgent, chunk, passed) in enumerate(wants)
    ]
    fit = draw(st.integers(1, 600))
    budget = Budget(fit, draw(st.integers(1, fit)), draw(st.booleans()), draw(st.booleans()))
    return demands, budget, draw(st.integers(max(1, len(demands)), 600))


def most(budget: Budget) -> int:
    """Prompt rows that no step of a budget exceeds."""
    return max(max(TILE, budget.fit) * 5 // 4, max(TILE, budget.fit) + TILE - 1 if budget.overdrawn else 0)


@given(situations())
def test_any_plan_keeps_to_its_rows_and_serves_every_stream(situation: tuple[list[Demand], Budget, int]) -> None:
    demands, budget, max_rows = situation
    chunks = plan(demands, budget=budget, max_rows=max_rows)
    wanted = {d.slot: d.tokens for d in demands}
    prefill = [c for c in chunks if wanted[c.slot]]
    assert len({c.slot for c in chunks}) == len(chunks)
    assert sum(c.rows for c in chunks) <= max_rows
    assert sum(c.rows for c in prefill) <= most(budget)
    assert [c for c in chunks if not wanted[c.slot]] == [Chunk(d.slot, 1, 1) for d in demands if not d.tokens]
    for chunk in prefill:
        assert 1 <= chunk.rows <= wanted[chunk.slot]
        assert chunk.outputs == (chunk.rows == wanted[chunk.slot])


@given(situations())
def test_any_plan_makes_progress_with_the_prompt_whose_turn_it_is(situation: tuple[list[Demand], Budget, int]) -> None:
    demands, budget, max_rows = situation
    chunks = {c.slot: c.rows for c in plan(demands, budget=budget, max_rows=max_rows)}
    turn = in_turn(demands)
    if turn:
        room = max_rows - sum(not d.tokens for d in demands)
        least = min(budget.light, TILE, turn[0].tokens, room)
        assert (chunks[turn[0].slot] if room else least) >= least


@given(situations())
def test_any_prompt_left_out_comes_after_all_that_were_taken(situation: tuple[list[Demand], Budget, int]) -> None:
    demands, budget, max_rows = situation
    chunks = plan(demands, budget=budget, max_rows=max_rows)
    begun = [any(c.slot == d.slot for c in chunks) for d in in_turn(demands)]
    assert begun == sorted(begun, reverse=True)


@given(situations())
def test_beside_watched_streams_what_comes_along_adds_little(situation: tuple[list[Demand], Budget, int]) -> None:
    demands, budget, max_rows = situation
    budget = budget._replace(watched=True)
    slots = {d.slot for d in demands if d.tokens}
    of_prompts = [c.rows for c in plan(demands, budget=budget, max_rows=max_rows) if c.slot in slots]
    assert len(of_prompts) <= 1 or sum(of_prompts) <= budget.light


def test_prompts_and_streams_are_in_the_order_of_their_slots_prompts_first() -> None:
    chunks = planned(decoding(1), decoding(0), prompt(3, 6), prompt(2, 2), fit=8, watched=False)
    assert chunks == [Chunk(2, 2, True), Chunk(3, 6, True), Chunk(0, 1, True), Chunk(1, 1, True)]


def test_streams_come_first_where_the_first_one_would_continue_the_prompts() -> None:
    chunks = planned(decoding(3), prompt(1, 6), prompt(2, 2), fit=8, watched=False)
    assert chunks == [Chunk(3, 1, True), Chunk(1, 6, True), Chunk(2, 2, True)]


@given(situations())
def test_no_prompt_is_next_to_a_stream(situation: tuple[list[Demand], Budget, int]) -> None:
    demands, budget, max_rows = situation
    for left, right in itertools.pairwise(plan(demands, budget=budget, max_rows=max_rows)):
        assert (left.rows == 1) == (right.rows == 1) or right.slot != left.slot + 1


def simulate(prompts: list[Demand], budget: Budget, *, arriving: int) -> tuple[list[int], list[list[int]]]:
    """Prompts beside two slots that get an urgent short one again and again; the slots that end, and rows of others.

    Of the first that has not ended, it is noted how many rows others got before each of its chunks.
    """
    waiting, ended, passed = list(prompts), list[int](), [[0] for _ in prompts]
    for step in range(100_000):
        while sum(d.slot >= len(prompts) for d in waiting) < 2:
            waiting.append(prompt(len(prompts) + step + len(waiting), arriving))
        chunks = {c.slot: c.rows for c in plan(waiting, budget=budget, max_rows=512)}
        made = sum(chunks.values())
        if chunks.get(len(ended)):
            passed[len(ended)].append(0)
        else:
            passed[len(ended)][-1] += made
        waiting = [
            d._replace(tokens=d.tokens - chunks[d.slot], chunk=chunks[d.slot], passed=0)
            if d.slot in chunks
            else d._replace(passed=d.passed + made)
            for d in waiting
        ]
        ended += [d.slot for d in waiting if not d.tokens and d.slot < len(prompts)]
        waiting = [d for d in waiting if d.tokens]
        if len(ended) == len(prompts):
            break
    return ended, passed


@given(st.integers(16, 500), st.integers(1, 100), st.booleans(), st.integers(1, 300), st.booleans())
def test_an_endless_stream_of_short_prompts_starves_nobody(
    fit: int, light: int, watched: bool, arriving: int, urgent: bool
) -> None:
    """The oldest keeps a third of the rows, or a ninth if it is not urgent; then comes the next."""
    budget = Budget(fit, min(light, fit), watched)
    ended, passed = simulate([prompt(n, 3000, urgent=urgent) for n in range(2)], budget, arriving=arriving)
    assert ended == [0, 1]
    patience = PATIENCE if urgent else PATIENCE_WITH_URGENT
    assert max(map(max, passed)) < patience * max(TILE, fit * 5 // 4) + most(budget)


def test_a_long_prompt_loses_two_thirds_at_most_to_any_number_of_short_ones() -> None:
    _, (passed,) = simulate([prompt(0, 4930)], Budget(100, 16, watched=True), arriving=20)
    assert sum(passed) <= 1.05 * PATIENCE * 4930


def test_one_short_prompt_costs_a_long_one_no_more_than_its_own_rows() -> None:
    assert [
        rows(prompt(0, 4930 - done, chunk=96), *others, fit=100)
        for done, others in ((96, ()), (192, (prompt(1, 5),)), (192, ()))
    ] == [{0: 96}, {1: 5}, {0: 96}]
