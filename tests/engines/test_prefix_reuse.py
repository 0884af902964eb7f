"""Which slot a prompt gets, and what it need not compute again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engines.api import Sequence
from engines.llamacpp.prefix_index import Known, PrefixIndex
from engines.llamacpp.prefix_tree import common_prefix
from engines.llamacpp.reuse import Reuse, find_donor, find_leader, find_reuse
from engines.llamacpp.slots import MIN_COPY, Run, Slot
from engines.llamacpp.text import OutputText

LONG = list(range(100, 100 + 3 * MIN_COPY))


def slot(index: int, cached: list[int] | None = None, *, busy: bool = False, used: int = 0) -> Slot:
    prompt = (cached or [1])[: 1 + len(cached or ()) // 2]
    writes = 1 if cached else None  # one that holds nothing has its prompt to read yet
    run = Run(Sequence("key", prompt, 1), 1, OutputText(), None, next_token=writes) if busy else None
    return Slot(index, list(cached or ()), run, used)


def known(prompt: list[int], *slots: Slot, cuts: bool = True, saved: int = 0) -> Known:
    found = PrefixIndex(slots, cuts=cuts).find(prompt[:-1])
    whole = zip(slots, found.held, strict=True)
    held = found.held if cuts else [held if held == len(slot.cached) else 0 for slot, held in whole]
    return found._replace(held=held, saved=saved)


def reuse(prompt: list[int], *slots: Slot, worth: int = MIN_COPY, cuts: bool = True, saved: int = 0) -> Reuse:
    return find_reuse(known(prompt, *slots, cuts=cuts, saved=saved), slots, worth=lambda tokens: worth)


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
    assert reuse([*MUCH[:520], 1], slot(0), slot(1, [9] * 50), saved=520) == Reuse(0, 520, restored=True)
    assert reuse([*MUCH[:520], 1], slot(0), slot(1, MUCH[:500]), saved=520) == Reuse(1, 500)
    assert reuse([*MUCH[:520], 1], slot(0), slot(1, MUCH[:400], busy=True), saved=520) == Reuse(0, 520, restored=True)


tokens = st.lists(st.integers(0, 2), max_size=20)


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


# --- runs that compute it now ----------------------------------------------------------------------------------------


def reading(index: int, prompt: list[int], done: int = 0, *, urgent: bool = True) -> Slot:
    """A slot whose run has that much of its prompt behind it."""
    run = Run(Sequence("key", prompt, 1, urgent=urgent), 1, OutputText(), None)
    return Slot(index, prompt[:done], run)


def leader(prompt: list[int], own: Slot, *others: Slot, urgent: bool = True) -> tuple[Slot, int] | None:
    slots = [own, *others]
    found = find_leader(known(prompt, *slots), own, slots, urgent=urgent)
    return None if found is None else (next(slot for slot in slots if slot.run is found[0]), found[1])


def test_a_run_that_will_read_the_same_is_waited_for() -> None:
    other = reading(1, [*LONG, 1], done=10)
    assert leader([*LONG, 2], slot(0), other) == (other, len(LONG))


def test_of_several_the_one_that_will_read_most_of_it_is() -> None:
    shorter, longer = reading(1, [*LONG[:50], 1]), reading(2, [*LONG[:60], 1])
    assert leader([*LONG, 2], slot(0), shorter, longer) == (longer, 60)


def test_a_run_that_has_read_it_or_answers_or_waits_itself_is_not_waited_for() -> None:
    assert leader([*LONG, 2], slot(0), reading(1, [*LONG, 1, 1], done=len(LONG))) is None
    answers = reading(1, [*LONG, 1], done=len(LONG) + 1)
    waits = reading(2, [*LONG, 1])
    assert answers.run is not None
    assert waits.run is not None
    answers.run.next_token, waits.run.leader = 7, answers.run
    assert leader([*LONG, 2], slot(0), answers, waits) is None


def test_an_urgent_prompt_does_not_wait_for_one_that_is_not() -> None:
    job = reading(1, [*LONG, 1], urgent=False)
    assert leader([*LONG, 2], slot(0), job) is None
    assert leader([*LONG, 2], slot(0), job, urgent=False) == (job, len(LONG))


def test_a_prompt_that_its_slot_nearly_holds_waits_for_nobody() -> None:
    assert leader([*LONG, 2], slot(0, LONG[: 1 - MIN_COPY]), reading(1, [*LONG, 1])) is None


def test_a_working_slot_copies_what_another_one_has_read_meanwhile() -> None:
    slots = [reading(0, [*LONG, 2], done=10), reading(1, [*LONG, 1], done=len(LONG))]
    found = find_donor(known([*LONG, 2], *slots), slots[0], slots, worth=lambda tokens: MIN_COPY)
    assert found == Reuse(0, len(LONG), copy_from=1)
    assert find_donor(known([*LONG, 2], *slots), slots[0], slots, worth=lambda tokens: len(LONG)) is None


# --- the index -------------------------------------------------------------------------------------------------------


changes = st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["work", "start", "stop", "move"]), prompts))


@given(all_slots, changes, prompts.filter(bool))
def test_the_index_knows_what_the_slots_hold_whatever_happens_to_them(
    slots: list[Slot], changes: list[tuple[int, str, list[int]]], prompt: list[int]
) -> None:
    """A run reads its prompt, writes on and takes some back, stops half way, or moves to another slot."""
    index = PrefixIndex(slots, cuts=True)
    for number, change, tokens_ in [*changes, (0, "look", [])]:
        one, other = slots[number % len(slots)], slots[(number + 1) % len(slots)]
        found = index.find(prompt)
        assert found.held == [common_prefix(prompt, slot.cached) for slot in slots]
        for slot, coming in zip(slots, found.coming, strict=True):
            if slot.run is not None and not slot.run.decoding:
                assert coming == common_prefix(prompt, list(slot.run.sequence.tokens))
        if change == "start":
            kept = common_prefix(one.cached, tokens_) // 2
            one.cached, one.run = tokens_[:kept], Run(Sequence("key", tokens_, 9), 1, OutputText(), None)
        elif change == "stop":
            one.run = None
        elif change == "move":
            one.cached, one.run, other.cached, other.run = [], None, one.cached, one.run
        elif one.run is not None and not one.run.decoding:
            one.cached += one.run.sequence.tokens[len(one.cached) :][: len(tokens_)]
            one.run.next_token = 7 if len(one.cached) == len(one.run.sequence.tokens) else None
        elif one.run is not None:  # only a run adds to its slot
            written = len(one.cached) - len(one.run.sequence.tokens)
            del one.cached[len(one.cached) - min(written, len(tokens_) // 2) :]  # guesses that were wrong
            one.cached += tokens_
