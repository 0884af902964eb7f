"""How many prompt tokens go into a step."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.api import ALONE, Beside
from engines.llamacpp.batch import GRAIN, MIN_CHUNK, TILE, Budget, Demand, plan
from engines.llamacpp.step_cost import StepCost

LONE_S = 0.5


def chunk(cost: StepCost, decode_rows: int, position: int = 0, beside: Beside = ALONE) -> int:
    """Rows that a prompt which never ends gets in a step beside so many streams."""
    budget = cost.budget(decode_rows, position, beside, watched=decode_rows > 0)
    return plan([Demand(0, 10**6, urgent=True, order=0)], budget=budget, max_rows=10**6)[0].rows


def test_beside_no_stream_a_step_has_a_target_of_its_own() -> None:
    cost = StepCost(0.1, 512, lone_s=LONE_S)
    cost.observe(decode_rows=0, prefill_tokens=512, seconds=5.12)  # 10 ms a token
    assert chunk(cost, 0) == TILE  # 50 would fit


def test_a_machine_that_computes_a_batch_in_time_gets_whole_batches_from_the_second_step_on() -> None:
    cost = StepCost(0.1, 2048, lone_s=LONE_S)
    first = chunk(cost, 0)
    cost.observe(decode_rows=0, prefill_tokens=first, seconds=0.008)  # as long as a step of a whole batch
    second = chunk(cost, 0)
    cost.observe(decode_rows=0, prefill_tokens=second, seconds=0.01)
    assert second >= 32 * first
    assert chunk(cost, 0) == 2048


def test_a_slow_machine_never_makes_a_step_much_longer_than_it_should() -> None:
    """200 ms a row, with stall_s = 60: a whole batch of 512 would take 102 s."""
    cost = StepCost(0.12, 512, lone_s=LONE_S)
    for _ in range(20):
        rows = chunk(cost, 0)
        assert rows <= 32
        cost.observe(decode_rows=0, prefill_tokens=rows, seconds=0.2 * rows)
    assert chunk(cost, 0) == MIN_CHUNK


def read(
    cost: StepCost, *, step_s: float, token_s: float, tokens: int = 3600, streams: int = 0, noise: float = 0.0
) -> list[tuple[int, float]]:
    """Chunks, and seconds of their steps, of a prompt on a machine of that cost."""
    random_, steps = random.Random(1), []
    while tokens:
        rows = min(tokens, chunk(cost, streams))
        seconds = (step_s + token_s * rows) * random_.uniform(1 - noise, 1 + noise)
        cost.observe(decode_rows=streams, prefill_tokens=rows, seconds=seconds)
        steps.append((rows, seconds))
        tokens -= rows
    return steps


@pytest.mark.parametrize("noise", [0.0, 0.5])
@pytest.mark.parametrize("streams", [0, 4])
@pytest.mark.parametrize("step_s", [0.45, 0.7, 1.5])
def test_where_a_step_takes_long_whatever_it_has_chunks_are_not_the_smallest(
    step_s: float, streams: int, noise: float
) -> None:
    """Other programs use the processors. Chunks of 16 would make it 225 steps."""
    cost = StepCost(0.12, 512, lone_s=LONE_S)
    cost.observe(decode_rows=4, prefill_tokens=0, seconds=0.02)  # when they did not
    cost.observe(decode_rows=0, prefill_tokens=512, seconds=0.3)
    steps = read(cost, step_s=step_s, token_s=0.002, streams=streams, noise=noise)
    assert len(steps) < 60
    assert max(seconds for _, seconds in steps) < 3.5 * step_s * (1 + noise)


def test_that_is_forgotten_when_the_machine_is_itself_again() -> None:
    cost = StepCost(0.12, 512, lone_s=LONE_S)
    read(cost, step_s=0.7, token_s=0.002)
    steps = read(cost, step_s=0.02, token_s=0.002, streams=4)
    assert all(seconds <= 0.16 for _, seconds in steps[8:])
    read(cost, step_s=0.7, token_s=0.002)
    cost.observe(decode_rows=4, prefill_tokens=0, seconds=0.02)
    assert chunk(cost, 4) == MIN_CHUNK


def test_behind_thousands_of_tokens_a_prompt_is_read_in_tiles() -> None:
    """Measured behind 4,000 tokens: 12 ms a token in chunks below a tile, 5 ms in tiles. Turns of 230 tokens."""
    cost = StepCost(0.1, 512, lone_s=LONE_S)
    cost.observe(decode_rows=2, prefill_tokens=0, seconds=0.02)
    turns = []
    for _ in range(4):
        chunks, left = [], 230
        while left:
            rows = min(left, chunk(cost, 2))
            seconds = 0.02 + rows * (0.005 if rows >= TILE else 0.012)
            cost.observe(decode_rows=2, prefill_tokens=rows, seconds=seconds)
            chunks.append(rows)
            left -= rows
        cost.observe(decode_rows=2, prefill_tokens=0, seconds=0.02)  # the answer
        turns.append(chunks)
    assert all(rows >= TILE for rows in turns[-1][:-1])
    assert max(max(turn) for turn in turns) <= 2 * TILE


def test_where_each_token_takes_long_a_longer_chunk_is_a_rare_trial() -> None:
    cost = StepCost(0.12, 512, lone_s=LONE_S)
    cost.observe(decode_rows=4, prefill_tokens=0, seconds=0.02)
    for _ in range(3):
        steps = read(cost, step_s=0.02, token_s=0.02, streams=4)
    rows = [rows for rows, _ in steps]
    assert sum(rows > MIN_CHUNK + 4 for rows in rows) <= len(rows) / 40
    assert max(rows) == TILE


def test_streams_of_another_model_take_their_time_and_set_the_target() -> None:
    cost = StepCost(0.1, 512, lone_s=LONE_S)
    cost.observe(decode_rows=0, prefill_tokens=100, seconds=0.1)  # 1 ms a token
    assert chunk(cost, 0) == 480
    assert chunk(cost, 0, beside=Beside(streams=1)) == 96
    assert chunk(cost, 0, beside=Beside(streams=1, streams_s=0.0795)) == TILE
    assert chunk(cost, 0, beside=Beside(streams=8, streams_s=0.3)) == 288


def test_streams_that_nobody_watches_set_no_pace() -> None:
    cost = StepCost(0.1, 512, lone_s=LONE_S)
    cost.observe(decode_rows=4, prefill_tokens=0, seconds=0.02)
    cost.observe(decode_rows=0, prefill_tokens=100, seconds=0.1)  # 1 ms a token
    assert cost.budget(4, watched=True) == Budget(fit=80, light=20, watched=True)
    assert cost.budget(4, watched=False) == Budget(fit=480, light=25, watched=False)
    assert cost.budget(4, beside=Beside(streams=1), watched=False) == cost.budget(4, watched=True)


def test_a_chunk_that_takes_more_than_its_time_is_called_so() -> None:
    cost = StepCost(0.1, 512, lone_s=LONE_S)
    for _ in range(8):  # 16 tokens 0.2 s, 64 of them 0.35
        size = cost.budget(0, watched=True).fit
        cost.observe(decode_rows=0, prefill_tokens=size, seconds=0.2 if size < TILE else 0.35)
    assert cost.budget(0, watched=True).overdrawn
    assert cost.budget(0, watched=True).fit == TILE
    assert not cost.budget(0, watched=False).overdrawn


def test_what_a_step_should_take_is_known_once_its_parts_are() -> None:
    cost = StepCost(0.1, 512, lone_s=LONE_S)
    cost.observe(decode_rows=4, prefill_tokens=0, seconds=0.02)
    assert cost.expected_s(decode_rows=4, prefill_tokens=0, position=0) == 0.02
    assert cost.expected_s(decode_rows=4, prefill_tokens=9, position=0) is None
    cost.observe(decode_rows=4, prefill_tokens=10, seconds=0.03)
    assert cost.expected_s(decode_rows=4, prefill_tokens=20, position=0) == pytest.approx(0.04)
    assert StepCost(0.1, 512, lone_s=LONE_S).expected_s(decode_rows=1, prefill_tokens=0, position=0) is None


def test_prompts_of_other_models_share_the_time_that_is_left() -> None:
    cost = StepCost(0.1, 512, lone_s=LONE_S)
    cost.observe(decode_rows=0, prefill_tokens=100, seconds=0.5)  # 5 ms a token
    assert chunk(cost, 0) == 96
    assert chunk(cost, 0, beside=Beside(prompts=4)) == 20
    assert chunk(cost, 0, beside=Beside(streams=1, prompts=0)) == 20
    assert chunk(cost, 0, beside=Beside(streams=1, prompts=9)) == MIN_CHUNK


def test_the_first_chunk_beside_streams_is_a_careful_one() -> None:
    assert MIN_CHUNK <= chunk(StepCost(0.1, 512, lone_s=LONE_S), 1) <= 64


def test_where_streams_alone_take_too_long_a_prompt_gets_as_much_time_as_they() -> None:
    cost = StepCost(0.1, 512, lone_s=LONE_S)
    cost.observe(decode_rows=4, prefill_tokens=0, seconds=0.5)
    cost.observe(decode_rows=4, prefill_tokens=32, seconds=1.3)  # 25 ms a token
    assert chunk(cost, 4) == 20


def test_a_prompt_moves_on_where_not_even_the_least_chunk_fits() -> None:
    cost = StepCost(0.1, 512, lone_s=LONE_S)
    cost.observe(decode_rows=4, prefill_tokens=0, seconds=0.01)
    cost.observe(decode_rows=4, prefill_tokens=1, seconds=1.01)
    assert chunk(cost, 4) == MIN_CHUNK


def test_a_batch_smaller_than_the_least_chunk_is_the_limit() -> None:
    cost = StepCost(0.1, 4, lone_s=LONE_S)
    cost.observe(decode_rows=1, prefill_tokens=3, seconds=5.0)
    assert chunk(cost, 1) == 4


def test_a_stream_that_is_alone_takes_its_time_too() -> None:
    cost = StepCost(0.305, 512, lone_s=LONE_S)
    cost.observe(decode_rows=1, prefill_tokens=0, seconds=0.1)
    cost.observe(decode_rows=1, prefill_tokens=10, seconds=0.2)
    assert chunk(cost, 1) == 20


def test_streams_never_seen_take_as_long_as_the_nearest_number_of_them() -> None:
    cost = StepCost(0.4, 512, lone_s=LONE_S)
    cost.observe(decode_rows=1, prefill_tokens=0, seconds=0.01)
    cost.observe(decode_rows=8, prefill_tokens=0, seconds=0.2)
    cost.observe(decode_rows=6, prefill_tokens=10, seconds=0.3)
    assert chunk(cost, 7) == 20


def test_one_slow_step_does_not_count_for_all() -> None:
    cost = StepCost(0.405, 512, lone_s=LONE_S)
    cost.observe(decode_rows=4, prefill_tokens=0, seconds=0.1)
    cost.observe(decode_rows=4, prefill_tokens=0, seconds=0.6)  # 0.2 s are expected from here on
    cost.observe(decode_rows=4, prefill_tokens=10, seconds=0.3)
    assert chunk(cost, 4) == 20


def test_a_prompt_that_seems_to_cost_nothing_costs_a_tenth_of_its_step() -> None:
    cost = StepCost(0.61, 512, lone_s=LONE_S)
    cost.observe(decode_rows=4, prefill_tokens=0, seconds=0.2)
    cost.observe(decode_rows=4, prefill_tokens=1, seconds=0.2)
    assert chunk(cost, 4) == 20


def test_a_step_of_no_time_at_all_is_survived() -> None:
    cost = StepCost(0.1, 512, lone_s=LONE_S)
    cost.observe(decode_rows=4, prefill_tokens=8, seconds=0.0)
    assert chunk(cost, 4) == 512


def test_a_price_known_at_one_place_holds_everywhere() -> None:
    cost = StepCost(0.2, 512, lone_s=LONE_S)
    cost.observe(decode_rows=4, prefill_tokens=10, seconds=0.1, position=100)
    assert chunk(cost, 4, 0) == chunk(cost, 4, 5_000) == 20


def test_no_token_is_expected_to_cost_less_than_half_of_the_mean() -> None:
    cost = StepCost(0.5, 512, lone_s=LONE_S)
    cost.observe(decode_rows=4, prefill_tokens=1, seconds=0.001, position=1_000)
    cost.observe(decode_rows=4, prefill_tokens=1, seconds=0.1, position=2_000)  # a mean of 56 ms
    assert chunk(cost, 4, 0) == 17


steps = st.tuples(st.integers(0, 16), st.integers(0, 512), st.floats(0, 100))


@given(st.lists(steps), st.integers(0, 16), st.integers(1, 2048), st.floats(0.001, 10))
def test_any_budget_is_within_its_bounds(
    observed: list[tuple[int, int, float]], rows: int, max_rows: int, target_s: float
) -> None:
    cost = StepCost(target_s, max_rows, lone_s=LONE_S)
    for decode_rows, prefill_tokens, seconds in observed:
        cost.observe(decode_rows=decode_rows, prefill_tokens=prefill_tokens, seconds=seconds)
    for watched in (True, False):
        budget = cost.budget(rows, watched=watched)
        assert min(MIN_CHUNK, max_rows) <= budget.light <= budget.fit <= max_rows


@pytest.mark.parametrize("known", [True, False], ids=["streams ran before", "prompt comes first"])
@pytest.mark.parametrize("row_ms", [0.5, 2.0])
@pytest.mark.parametrize("token_ms", [0.1, 0.4, 2.0])
def test_steps_of_a_machine_of_known_cost_come_close_to_the_target(token_ms: float, row_ms: float, known: bool) -> None:
    """10 ms a step, so much a row, 5 % of noise; the prompt never ends.

    One tile is taken where a part of it fits, of more rows whole grains that fit: a step may be short of the target by
    one of those, and by another where no step without a prompt was seen, and the streams' time counts as the prompt's.
    """
    noise = random.Random(1)
    cost, streams = StepCost(0.1, 1024, lone_s=LONE_S), 8

    def step(decode_rows: int, prefill_tokens: int) -> float:
        seconds = (10 + row_ms * decode_rows + token_ms * prefill_tokens) / 1e3 * noise.uniform(0.95, 1.05)
        cost.observe(decode_rows=decode_rows, prefill_tokens=prefill_tokens, seconds=seconds)
        return seconds

    if known:
        for _ in range(20):
            step(streams, 0)
    took = [step(streams, chunk(cost, streams)) for _ in range(60)]
    tile_s, grain_s = token_ms * TILE / 1e3, token_ms * GRAIN / 1e3
    least_s = max(0.1 - grain_s * (1 if known else 2), tile_s) * 0.9
    most_s = max(0.11, 0.01 + row_ms * streams / 1e3 + tile_s) * 1.05
    assert all(least_s <= seconds <= most_s for seconds in took[40:])


def test_deep_in_a_long_prompt_chunks_are_smaller_and_the_next_prompt_begins_with_large_ones_again() -> None:
    """10 ms a step, and a token that costs 0.2 ms at the beginning of a prompt and 1.2 ms after 4,000 tokens."""
    cost = StepCost(0.1, 1024, lone_s=LONE_S)
    for _ in range(20):
        cost.observe(decode_rows=4, prefill_tokens=0, seconds=0.01)

    def prompt() -> list[tuple[int, float]]:
        position, made = 0, []
        while position < 4_000:
            tokens = chunk(cost, 4, position)
            seconds = 0.01 + sum(0.0002 + 0.001 * (position + n) / 4_000 for n in range(tokens))
            cost.observe(decode_rows=4, prefill_tokens=tokens, position=position, seconds=seconds)
            made.append((tokens, seconds))
            position += tokens
        return made

    prompt()
    again = prompt()
    assert again[0][0] > again[-1][0]
    assert all(seconds < 0.16 for _, seconds in again)
    assert all(seconds > 0.04 for _, seconds in again[1:-1])  # what does not quite fit is left out
