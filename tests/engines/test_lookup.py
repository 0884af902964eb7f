"""Guesses from a text's own past."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.llamacpp.lookup import CATCH_UP, Lookup

THE, QUICK, BROWN, FOX, JUMPS, OVER, DOG, RED, SO = range(10, 19)
SENTENCE = (THE, QUICK, BROWN, FOX, JUMPS, OVER, THE, DOG)


def after(prompt: Sequence[int], *written: int) -> Lookup:
    lookup = Lookup(prompt)
    for token in written:
        lookup.took(token)
    return lookup


def test_what_followed_the_same_words_is_the_guess() -> None:
    lookup = after((*SENTENCE, SO), THE, QUICK)
    assert lookup.guess(3) == [BROWN, FOX, JUMPS]
    assert (lookup.expected, lookup.agree) == (BROWN, 2)


def test_one_word_alone_is_no_reason_to_guess() -> None:
    lookup = after((*SENTENCE, SO), THE)
    assert (lookup.guess(3), lookup.expected) == ((), None)


def test_each_right_guess_makes_the_next_one_surer() -> None:
    lookup = after((*SENTENCE, SO), THE, QUICK, BROWN, FOX)
    assert (lookup.guess(2), lookup.agree) == ([JUMPS, OVER], 4)


def test_a_word_in_place_of_another_is_stepped_over() -> None:
    lookup = after((*SENTENCE, SO), THE, QUICK, RED)
    assert (lookup.guess(2), lookup.agree) == ([FOX, JUMPS], 0)
    lookup.took(FOX)
    assert (lookup.guess(2), lookup.agree) == ([JUMPS, OVER], 1)


def test_a_word_that_is_put_in_is_noticed_at_the_next() -> None:
    lookup = after((*SENTENCE, SO), THE, QUICK, RED, BROWN)
    assert (lookup.guess(2), lookup.agree) == ([FOX, JUMPS], 1)


def test_words_that_are_left_out_are_noticed_at_once() -> None:
    lookup = after((*SENTENCE, SO), THE, QUICK, JUMPS)
    assert (lookup.guess(2), lookup.agree) == ([OVER, THE], 1)


def test_an_alignment_is_given_up_after_some_wrong_guesses() -> None:
    lookup = after((*SENTENCE, *range(50, 70), SO), THE, QUICK, 90, 91, 92)
    assert lookup.expected is not None
    lookup.took(93)
    lookup.took(94)
    assert lookup.expected is None


def test_the_place_that_agrees_longest_wins_over_a_later_one() -> None:
    lookup = after((1, 2, 3, 4, 5, 6, 0, 3, 4, 7, 0), 1, 2, 3, 4)
    assert lookup.guess(2) == [5, 6]
    lookup = after((1, 2, 3, 4, 5, 6, 0, 3, 4, 7, 0), 3, 4)
    assert lookup.guess(1) == [7], "none agrees longer: the latest"


def test_what_repeats_goes_on_repeating() -> None:
    assert after((7,), 1, 2, 3, 1, 2).guess(7) == [3, 1, 2, 3, 1, 2, 3]
    assert after((7,), 5, 5, 5).guess(4) == [5, 5, 5, 5]


def test_a_long_prompt_is_taken_in_over_several_tokens() -> None:
    long = [*SENTENCE, *range(1000, 1000 + 2 * CATCH_UP), SO]
    lookup = after(long, THE, QUICK)
    assert lookup.guess(1) == [BROWN], "the oldest comes first"
    lookup = after([*range(1000, 1000 + 2 * CATCH_UP), *SENTENCE, SO], SO, THE)
    lookup.took(QUICK)
    assert lookup.guess(1) == [BROWN]


@pytest.mark.parametrize("length", [1, 2, 3])
def test_the_shortest_prompts(length: int) -> None:
    lookup = Lookup(range(length))
    assert (lookup.guess(5), lookup.expected) == ((), None)
    lookup.took(0)
    assert list(lookup.guess(0)) == []


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=12), st.lists(st.integers(0, 3), max_size=60), st.integers(1, 9)
)
def test_a_guess_is_what_stands_after_a_place_that_ends_alike(prompt: list[int], written: list[int], most: int) -> None:
    lookup = after(prompt, *written)
    text = [*prompt, *written]
    guess = list(lookup.guess(most))
    assert len(guess) in (0, most)
    assert not guess or guess[0] == lookup.expected
    if not lookup.agree:
        return
    places = [place for place in range(1, len(text)) if text[place] == guess[0]]
    assert any(text[place - lookup.agree : place] == text[len(text) - lookup.agree :] for place in places)


@given(st.lists(st.integers(0, 1), min_size=2, max_size=20), st.lists(st.integers(0, 1), max_size=40))
def test_two_that_were_written_before_are_always_found(prompt: list[int], written: list[int]) -> None:
    lookup = after(prompt, *written)
    text = [*prompt, *written]
    pairs = list(itertools.pairwise(text))
    if written and pairs[-1] in pairs[:-1]:
        assert lookup.expected is not None


def test_a_token_is_taken_in_without_looking_through_the_text() -> None:
    """So many lines are run for each, however long the text is, and however often its end is in it."""

    def lines(length: int) -> int:
        lookup = after([1, 2] * (length // 2))
        for _ in range(20_000 // CATCH_UP + 1):
            lookup.took(9)
        count = 0

        def trace(*_: object) -> object:
            nonlocal count
            count += 1
            return trace

        sys.settrace(trace)  # type: ignore[arg-type]
        try:
            for token in (1, 2, 1, 3, 1, 2):
                lookup.took(token)
        finally:
            sys.settrace(None)
        return count

    assert lines(20_000) <= lines(400)
