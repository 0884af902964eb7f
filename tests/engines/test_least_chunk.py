"""How small a chunk may become where nothing fits: what is tried, what is kept, what is forgotten."""

from __future__ import annotations

from engines.llamacpp.batch import MIN_CHUNK, TILE, WORTH_A_TILE
from engines.llamacpp.least_chunk import LeastChunk

NOTHING = MIN_CHUNK - 6
"""Tokens that fit."""


def after(*steps: tuple[int, float]) -> LeastChunk:
    """What is known after steps with so many prompt tokens, which took so long."""
    least = LeastChunk()
    for tokens, seconds in steps:
        least.observe(tokens, seconds)
    return least


def tile(seconds: float = 0.5) -> LeastChunk:
    """Where a tile is the least, and takes so long."""
    least = after(*[(MIN_CHUNK, seconds * 0.9)] * 3, (TILE, seconds))
    assert least.size(NOTHING) == TILE
    return least


def test_ends_that_were_read_along_do_not_make_longer_chunks_look_cheap() -> None:
    least = after((16, 0.3), (16, 0.3), (16, 0.3), (64, 0.5))
    assert least.size(10) == TILE
    for _ in range(5):
        least.observe(110, 0.86)
    least.observe(128, 0.68)  # two thirds of a token's price
    assert least.size(10) == TILE


def test_where_so_much_fits_that_a_tile_is_worth_it_nothing_is_held_to() -> None:
    assert tile().size(WORTH_A_TILE - 1) == TILE
    least = tile()
    assert least.size(WORTH_A_TILE) == WORTH_A_TILE
    assert least.size(NOTHING) == MIN_CHUNK


def test_a_chunk_beyond_a_tile_is_held_to_until_twice_as_many_fit() -> None:
    least = after(*[(MIN_CHUNK, 0.5)] * 3, (TILE, 0.55), (2 * TILE, 0.7))
    assert least.size(NOTHING) == 2 * TILE
    assert least.size(2 * TILE - 1) == 2 * TILE
    assert least.size(4 * TILE) == 4 * TILE


def test_a_machine_that_is_itself_again_is_one_that_takes_less_than_half() -> None:
    for seconds, forgotten in ((0.25, False), (0.24, True)):
        least = tile(0.5)
        least.observe(TILE, seconds)
        assert (least.size(NOTHING) == MIN_CHUNK) == forgotten


def test_one_step_out_of_line_does_not_count_for_all() -> None:
    least = after(*[(MIN_CHUNK, 0.8)] * 3, (MIN_CHUNK, 0.45), (TILE, 1.5))
    assert least.size(NOTHING) == TILE


def test_no_trial_where_it_would_take_long_if_each_token_did() -> None:
    assert after(*[(MIN_CHUNK, 3.0)] * 3).size(NOTHING) == TILE
    assert after(*[(MIN_CHUNK, 3.1)] * 3).size(NOTHING) == MIN_CHUNK


def test_after_a_trial_that_was_not_worth_it_the_next_is_twice_as_far_away() -> None:
    least = after(*[(MIN_CHUNK, 0.3)] * 3, (TILE, 1.2))
    for steps in (6, 12):
        for _ in range(steps):
            assert least.size(NOTHING) == MIN_CHUNK
            least.observe(MIN_CHUNK, 0.3)
        assert least.size(NOTHING) == TILE
        least.observe(TILE, 1.2)
