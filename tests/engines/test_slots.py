"""Which slot a prompt gets, and what it need not compute again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engines.api import Sequence
from engines.llamacpp.slots import MIN_COPY, Reuse, Run, Slot, common_prefix, find_reuse
from engines.llamacpp.text import OutputText

LONG = list(range(100, 100 + 3 * MIN_COPY))


def slot(index: int, cached: list[int] | None = None, *, busy: bool = False, used: int = 0) -> Slot:
    run = Run(Sequence("key", [1], 1), 1, OutputText(), None) if busy else None
    return Slot(index, list(cached or ()), run, used)


def reuse(prompt: list[int], *slots: Slot, worth: int = MIN_COPY, cuts: bool = True, stored: int = 0) -> Reuse:
    def kept(slot: Slot, keep: int) -> int:
        return keep if cuts or keep == len(slot.cached) else 0

    return find_reuse(prompt, slots, worth=lambda tokens: worth, kept=kept, stored=stored)


def test_an_empty_slot_goes_before_one_whose_cache_would_be_lost() -> None:
    assert reuse([1, 2], slot(0, [7, 8, 9], used=1), slot(1, used=2)) == Reuse(1, 0)


def test_the_slot_used_longest_ago_goes_first() -> None:
    assert reuse([1, 2], slot(0, [7], used=3), slot(1, [8], used=2), slot(2, [9], used=4)) == Reuse(1, 0)


def test_a_conversation_returns_to_its_slot() -> None:
    assert reuse([1, 2, 3, 4, 5], slot(0), slot(1, [1, 2, 3, 4])) == Reuse(1, 4)


def test_the_last_prompt_token_is_always_computed() -> None:
    assert reuse([1, 2, 3], slot(0, [1, 2, 3])) == Reuse(0, 2)
    assert reuse([1], slot(0, [1])) == Reuse(0, 0)


def test_a_long_prefix_in_a_busy_slot_is_copied() -> None:
    assert reuse([*LONG, 1], slot(0), slot(1, [*LONG, 2], busy=True)) == Reuse(0, len(LONG), copy_from=1)


def test_a_short_prefix_is_not_worth_a_copy() -> None:
    assert reuse([*LONG[: MIN_COPY - 1], 1], slot(0), slot(1, LONG, busy=True)) == Reuse(0, 0)


def test_a_copy_must_save_more_than_the_slot_has_itself() -> None:
    own, other = slot(0, LONG[:MIN_COPY]), slot(1, LONG[: 2 * MIN_COPY - 1], busy=True)
    assert reuse([*LONG, 1], own, other) == Reuse(0, MIN_COPY)


def test_a_slot_that_would_lose_more_than_it_gives_is_copied_from() -> None:
    much = [*LONG, *range(1000, 1200)]
    assert reuse([*LONG, 1], slot(0), slot(1, much)) == Reuse(0, len(LONG), copy_from=1)


MUCH = list(range(1000, 2000))
"""A conversation."""


def test_a_prompt_that_shares_the_beginning_of_another_conversation_leaves_it_whole() -> None:
    """It took the only slot with anything in it, and the conversation's next turn computed 507 tokens again."""
    slots = [slot(0, MUCH, used=1), slot(1), slot(2), slot(3)]
    assert reuse([*MUCH[:520], 1, 2], *slots) == Reuse(1, 520, copy_from=0)


def test_of_two_conversations_the_older_one_goes() -> None:
    slots = [slot(0, MUCH, used=2), slot(1, [7] * 900, used=1)]
    assert reuse([*MUCH[:520], 1], *slots) == Reuse(1, 520, copy_from=0)


def test_a_long_conversation_is_not_given_up_for_the_end_of_another() -> None:
    """A reply that a template leaves out of the history is cut off in each turn."""
    slots = [slot(0, MUCH, used=2), slot(1, [7] * 900, used=1)]
    assert reuse([*MUCH[:560], 1], *slots) == Reuse(0, 560)


def test_a_few_tokens_that_are_cut_off_are_no_loss() -> None:
    cut = len(MUCH) - MIN_COPY + 1
    assert reuse([*MUCH[:cut], 1, 2], slot(0, MUCH, used=1), slot(1)) == Reuse(0, cut)


def test_what_a_copy_costs_decides() -> None:
    slots = [slot(0, MUCH, used=1), slot(1)]
    assert reuse([*MUCH[:700], 1], *slots, worth=300) == Reuse(1, 700, copy_from=0)
    assert reuse([*MUCH[:701], 1], *slots, worth=300) == Reuse(0, 701)


def test_a_beginning_that_all_share_is_no_reason_to_take_a_slot() -> None:
    slots = [slot(0, [1, *MUCH], used=3), slot(1, [2] * 5000, used=1), slot(2, [3] * 5000, used=2)]
    assert reuse([1, 2, 3], *slots) == Reuse(1, 0)


def test_an_empty_slot_goes_before_one_that_is_better_placed() -> None:
    slots = [slot(0, busy=True), slot(1, [7] * 99, used=1), slot(2, [8] * 99, used=2), slot(3)]
    assert reuse([1, 2], *slots) == Reuse(3, 0)


def test_the_only_free_slot_is_taken_whatever_it_holds() -> None:
    assert reuse([*MUCH[:520], 1], slot(0, MUCH), slot(1, busy=True)) == Reuse(0, 520)


def test_memory_that_cannot_be_cut_serves_only_what_goes_on_after_all_of_it() -> None:
    much = [*LONG, *range(1000, 1200)]
    assert reuse([*LONG, 1], slot(0), slot(1, much), cuts=False) == Reuse(0, 0)
    assert reuse([*much, 1], slot(0), slot(1, much), cuts=False) == Reuse(1, len(much))
    assert reuse([*much, 1], slot(0), slot(1, much, busy=True), cuts=False) == Reuse(0, len(much), copy_from=1)


def test_what_is_saved_is_restored_if_no_slot_holds_about_as_much() -> None:
    assert reuse([*MUCH[:520], 1], slot(0), slot(1, [9] * 50), stored=520) == Reuse(0, 520, stored=True)
    assert reuse([*MUCH[:520], 1], slot(0), slot(1, MUCH[:500]), stored=520) == Reuse(1, 500)
    assert reuse([*MUCH[:520], 1], slot(0), slot(1, MUCH[:400], busy=True), stored=520) == Reuse(0, 520, stored=True)


tokens = st.lists(st.integers(0, 2), max_size=20)


@given(tokens, tokens, tokens)
def test_common_prefix_equals_comparing_one_by_one(shared: list[int], a: list[int], b: list[int]) -> None:
    a, b = shared + a, shared + b
    naive = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    assert common_prefix(a, b) == naive


prompts = st.builds(lambda n, tail: LONG[:n] + tail, st.integers(0, len(LONG)), tokens)
all_slots = st.lists(st.tuples(prompts, st.booleans()), min_size=1, max_size=6).flatmap(
    lambda contents: st.permutations(range(len(contents))).map(
        lambda ages: [
            slot(i, cached, busy=busy, used=ages[i] + bool(cached)) for i, (cached, busy) in enumerate(contents)
        ]
    )
)


@given(prompts.filter(bool), all_slots.filter(lambda slots: any(s.run is None for s in slots)), st.booleans())
def test_any_reuse_is_of_a_free_slot_and_of_what_is_cached(prompt: list[int], slots: list[Slot], cuts: bool) -> None:
    found = reuse(prompt, *slots, cuts=cuts)
    source = slots[found.slot if found.copy_from is None else found.copy_from]
    assert slots[found.slot].run is None
    assert 0 <= found.keep < len(prompt)
    assert source.cached[: found.keep] == prompt[: found.keep]
    assert found.copy_from != found.slot
    assert cuts or found.keep in (0, len(source.cached))


@given(prompts.filter(bool), all_slots.filter(lambda slots: any(s.run is None for s in slots)))
def test_while_a_slot_is_empty_no_cache_loses_what_a_copy_would_keep(prompt: list[int], slots: list[Slot]) -> None:
    empty = any(s.run is None and not s.cached for s in slots)
    taken = slots[reuse(prompt, *slots).slot]
    if empty:
        assert len(taken.cached) - common_prefix(prompt[:-1], taken.cached) < MIN_COPY


@given(prompts.filter(bool), all_slots.filter(lambda slots: any(s.run is None for s in slots)))
def test_no_prefix_is_left_that_a_copy_would_have_saved(prompt: list[int], slots: list[Slot]) -> None:
    best = max(common_prefix(prompt[:-1], s.cached) for s in slots)
    assert reuse(prompt, *slots).keep > best - MIN_COPY


def test_of_the_older_free_slots_one_beside_those_that_work_is_taken() -> None:
    """A step over neighbours is one pass; see `engines.llamacpp.batch`."""
    slots = [slot(0, [7], used=1), slot(1, [8], used=2), slot(2, busy=True), slot(3, [9], used=3), slot(4, [6], used=4)]
    assert reuse([1, 2], *slots) == Reuse(1, 0)


def test_a_hole_is_filled_before_the_row_grows() -> None:
    slots = [slot(0), slot(1, busy=True), slot(2), slot(3, busy=True), slot(4), slot(5)]
    assert reuse([1, 2], *slots) == Reuse(2, 0)


def test_the_newer_half_of_what_is_cached_is_not_given_up_for_that() -> None:
    slots = [slot(0, busy=True), slot(1, [8], used=9), slot(2, [7], used=2), slot(3, [6], used=1), slot(4, [5], used=8)]
    assert reuse([1, 2], *slots) == Reuse(2, 0)
