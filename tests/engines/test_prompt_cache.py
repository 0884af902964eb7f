"""Prompts that have left their slot: found again, within a bound, and as good as computed."""

from __future__ import annotations

import dataclasses
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.llamacpp.model import LlamaModel
from engines.llamacpp.prefix_tree import PrefixTree, key_of
from engines.llamacpp.prompt_cache import PromptCache
from testkit import tiny_gguf
from tests.engines.support import count_rows, exact, finish, loaded, sequence, text_of

WRITERS = [
    tiny_gguf.write_tiny_llama,
    tiny_gguf.write_tiny_swa,
    tiny_gguf.write_tiny_mamba,
    tiny_gguf.write_tiny_lfm2,
]
TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=12)


def state(n_bytes: int = 8) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.zeros(n_bytes, np.uint8)


# --- the structure ---------------------------------------------------------------------------------------------------


def empty(limit: int = 1 << 20, *, whole_only: bool = False, spare: int = 1) -> PromptCache:
    return PromptCache(limit, PrefixTree(whole_only=whole_only), spare=spare)


def found(cache: PromptCache, tokens: list[int]) -> bool:
    """Whether all of these are saved; they count as used then."""
    match = cache._tree.match(key_of(tokens))
    if match.entry is None or match.shared < len(tokens):
        return False
    cache.touch(match.entry)
    return True


@given(st.lists(st.tuples(TOKENS, st.integers(1, 60)), max_size=30), st.integers(0, 200), st.booleans())
def test_the_bound_holds_whatever_comes(added: list[tuple[list[int], int]], limit: int, whole_only: bool) -> None:
    cache = empty(limit, whole_only=whole_only)
    for tokens, n_bytes in added:
        cache.add(tokens, state(n_bytes))
        assert cache.n_bytes <= limit
        assert cache.n_bytes == sum(entry.n_bytes for entry in cache._entries)
        assert set(cache._entries) == set(cache._tree._entries)


def test_the_least_recently_used_goes_first() -> None:
    cache = empty(2 * (4 + 8))
    cache.add([1], state())
    cache.add([2], state())
    assert found(cache, [1])
    cache.add([3], state())
    assert [found(cache, [token]) for token in (1, 2, 3)] == [True, False, True]


def test_a_prefix_that_others_extend_stays_before_a_tail() -> None:
    cache = empty(2 * 12 + 2 * 16, whole_only=True)
    for tokens in ([1], [1, 2], [1, 3], [4]):
        cache.add(tokens, state())
    cache.add([5, 6], state())
    assert [found(cache, tokens) for tokens in ([1], [1, 2], [1, 3], [4])] == [True, False, True, True]


def test_a_longer_state_replaces_its_beginning_if_it_can_be_cut() -> None:
    for whole_only, left in ((False, 1), (True, 2)):
        cache = empty(whole_only=whole_only)
        cache.add([1, 2], state())
        cache.add([1, 2, 3], state())
        assert len(cache) == left
        assert found(cache, [1, 2])


def test_a_turn_whose_answer_came_back_a_little_changed_is_not_kept_beside_the_next() -> None:
    """Each would take the memory of the whole conversation."""
    turn, answer, other = [1] * 40, [2, 3], [4] * 40
    for whole_only, left in ((False, 2), (True, 3)):
        cache = empty(whole_only=whole_only, spare=3)
        cache.add(other, state())
        cache.add([*turn, *answer], state())
        cache.add([*turn, 5, 6, 7], state())
        assert len(cache) == left
        assert found(cache, other)
        assert whole_only or found(cache, turn)


def test_what_has_as_many_tokens_of_its_own_as_are_worth_it_is_kept() -> None:
    cache = empty(spare=3)
    cache.add([1, 1, 2, 2, 2], state())
    cache.add([1, 1, 3], state())
    assert len(cache) == 2


def test_what_cannot_be_cut_back_is_kept_beside_another_end() -> None:
    cache = empty(whole_only=True, spare=3)
    cache.add([1, 1, 2], state())
    cache.add([1, 1, 3], state())
    assert found(cache, [1, 1, 2])
    assert found(cache, [1, 1, 3])


def test_what_fills_the_bound_is_kept() -> None:
    cache = empty(4 + 8)
    cache.add([1], state(8))
    assert found(cache, [1])


def test_the_same_prompt_is_kept_once() -> None:
    for whole_only in (False, True):
        cache = empty(whole_only=whole_only)
        for n_bytes in (8, 9):
            cache.add([1, 2], state(n_bytes))
        assert [entry.state.nbytes for entry in cache._entries] == [9]


def test_what_is_larger_than_the_bound_pushes_nothing_out() -> None:
    cache = empty(50)
    cache.add([1], state())
    cache.add([2], state(60))
    assert found(cache, [1])
    assert not found(cache, [2])


# --- with llama.cpp --------------------------------------------------------------------------------------------------


def conversation(seed: int, length: int = 100) -> tuple[int, ...]:
    random_ = random.Random(seed)
    return (1, *(random_.randrange(300, 750) for _ in range(length)))


def cold(path: Path, prompt: tuple[int, ...], max_tokens: int, **shape: bool) -> str:
    with loaded(dataclasses.replace(exact(path, ctx=1024, **shape), prompt_cache_mib=0)) as model:
        return text_of(model, prompt, max_tokens)


@pytest.mark.parametrize("write", WRITERS)
def test_a_conversation_that_lost_its_slot_is_not_computed_again(
    write: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "model.gguf")
    first, other, more = conversation(1), conversation(2), conversation(3, 5)
    with loaded(exact(path, ctx=1024)) as model:
        text_of(model, first, 4)
        text_of(model, other, 4)
        rows = count_rows(model, monkeypatch)
        assert text_of(model, (*first, *more), 8) == cold(path, (*first, *more), 8)
    assert sum(rows) <= len(more) + 10


@pytest.mark.parametrize("write", WRITERS[1:])
def test_the_same_prompt_again_is_not_computed_again_even_if_memory_cannot_be_cut(
    write: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "model.gguf")
    with loaded(exact(path, ctx=1024, swa_full=False)) as model:
        text = text_of(model, conversation(1), 300)
        rows = count_rows(model, monkeypatch)
        assert text_of(model, conversation(1), 300) == text
    assert rows[0] == 1


def test_without_a_prompt_cache_nothing_is_saved(tiny_model_path: Path) -> None:
    with loaded(dataclasses.replace(exact(tiny_model_path), prompt_cache_mib=0)) as model:
        for seed in (1, 2, 1):
            text_of(model, conversation(seed), 4)
        assert len(model._saver._cache) == 0


def test_a_state_that_is_refused_is_computed_and_forgotten(
    tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with loaded(exact(tiny_model_path)) as model:
        text_of(model, conversation(1), 4)
        text_of(model, conversation(2), 4)
        monkeypatch.setattr("llama_cpp.llama_state_seq_set_data", lambda *arguments: 0)
        assert text_of(model, conversation(1), 8) == cold(tiny_model_path, conversation(1), 8)
        assert not found(model._saver._cache, list(conversation(1)))


LIMITED = """
import logging, resource, sys
from pathlib import Path
from engines.api import Sequence
from tests.engines.support import GREEDY, exact, loaded, text_of
from tests.engines.test_prompt_cache import conversation

logging.basicConfig(format="%(message)s", level=logging.WARNING)
kind = getattr(resource, sys.argv[2])
with loaded(exact(Path(sys.argv[1]), ctx=4096, batch=512)) as model:
    text_of(model, conversation(0, 4000), 4)
    status = Path("/proc/self/status").read_text()
    used = dict(line.split(":") for line in status.splitlines())["VmData" if "DATA" in sys.argv[2] else "VmSize"]
    resource.setrlimit(kind, ((int(used.split()[0]) << 10) + (9 << 20), -1))
    for seed in range(1, 8):
        text = text_of(model, conversation(seed, 4000), 8)
    resource.setrlimit(kind, (-1, -1))
    print(model.saved_bytes, model._saver._cache.limit_bytes, text, sep="\\n")
"""


@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_memory_that_cannot_be_had_makes_the_cache_smaller(limit: str, tiny_model_path: Path) -> None:
    """The process may take 9 MiB more; each of the seven prompts that leave the slot takes 2."""
    command = [sys.executable, "-c", LIMITED, str(tiny_model_path), limit]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    saved, bound, text = done.stdout.split("\n", 2)
    assert 0 < int(saved) <= int(bound) < 9 << 20
    assert done.stderr.count("no more host memory for the prompt cache") == 1
    with loaded(dataclasses.replace(exact(tiny_model_path, ctx=4096, batch=512), prompt_cache_mib=0)) as model:
        assert text_of(model, conversation(7, 4000), 8) == text.removesuffix("\n")


def test_a_copy_between_slots_that_has_no_memory_to_pass_through_is_made_by_llama_cpp(
    tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*shape: object) -> None:
        raise MemoryError

    prompt = conversation(1, 300)
    with loaded(exact(tiny_model_path, slots=2, ctx=1024)) as model:
        text_of(model, prompt, 4)
        with monkeypatch.context() as patch:
            patch.setattr("numpy.empty", fail)
            model.admit(sequence((*prompt[:200], 400), 8))
        assert model.busy
        assert model._context.is_queued(1)
        assert finish(model)["a"].text == cold(tiny_model_path, (*prompt[:200], 400), 8)


def test_a_failed_model_forgets_what_it_saved(tiny_model_path: Path) -> None:
    with loaded(exact(tiny_model_path)) as model:
        text_of(model, conversation(1), 4)
        text_of(model, conversation(2), 4)
        model.reset()
        assert len(model._saver._cache) == 0


@pytest.mark.parametrize(("share", "kept"), [(0.2, True), (0.3, False)])
def test_no_copy_is_made_that_a_watched_stream_would_feel(
    tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, kept: bool
) -> None:
    step_s = 0.02
    spec = dataclasses.replace(exact(tiny_model_path, slots=2, ctx=1024), step_target_s=step_s / 2)
    with loaded(spec) as model:
        text_of(model, conversation(1), 4)
        leaving = model._slots[0]
        model.admit(sequence(conversation(2), 400, key="watched"))
        while not any(event.text for event in model.step()):
            pass
        monkeypatch.setattr(model._planner._cost, "expected_s", lambda **_: step_s)
        monkeypatch.setattr(model._planner._cost, "token_s", lambda: step_s)
        model._saver.next_step()
        model._saver._save_s = share * step_s / model._context.state_bytes(leaving.index)
        assert leaving.run is None
        model._saver.save(leaving, losing=len(leaving.cached))
        assert found(model._saver._cache, list(leaving.cached)) == kept


def test_a_save_leaves_the_time_for_the_restore_that_follows(tiny_model_path: Path) -> None:
    with loaded(exact(tiny_model_path, slots=2, ctx=1024)) as model:
        text_of(model, conversation(1), 4)
        model._saver.save(model._slots[0], losing=len(model._slots[0].cached))
        (entry,) = model._saver._cache._entries
        model.admit(sequence(conversation(2), 400, key="watched"))
        while not any(event.text for event in model.step()):
            pass
        free = next(slot for slot in model._slots if slot.run is None)
        free.cached = list(conversation(3))
        seconds = entry.state.nbytes * model._saver._save_s
        model._saver._restore_s = model._saver._save_s
        step_s = model._planner._cost.expected_s(decode_rows=1, prefill_tokens=0, position=0)
        model._saver._limit_s = (step_s or 0) + model._saver.spent_s + 1.5 * seconds
        model._saver.save(free, losing=len(free.cached), then=entry)
        assert not found(model._saver._cache, list(conversation(3))), "both together take too long"
        model._saver.save(free, losing=len(free.cached))
        assert found(model._saver._cache, list(conversation(3)))


@pytest.mark.parametrize("cache_type", ["f32", "f16"])
@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("swa_full", [True, False], ids=["whole cache", "window only"])
def test_conversations_in_any_order_give_the_text_of_a_cold_run(
    write: Callable[[Path], Path], swa_full: bool, slots: int, cache_type: str, tmp_path: Path
) -> None:
    """They fork, repeat, get shorter, come together and are cancelled half way."""
    path = write(tmp_path / "model.gguf")
    random_ = random.Random(f"{slots}{swa_full}")
    shape = dataclasses.replace(
        exact(path, slots=slots, ctx=1024, batch=48, swa_full=swa_full),
        cache_type_k=cache_type,
        cache_type_v=cache_type,
    )
    alone = dataclasses.replace(shape, slots=1, prompt_cache_mib=0)
    prompts = [conversation(0, 300), conversation(1, 300), conversation(2, 40)]
    with loaded(shape) as model, loaded(alone) as other:
        for turn in range(30):
            parent = random_.choice(prompts[-6:])
            cut = random_.choice([len(parent), len(parent), len(parent) - 1, random_.randrange(1, len(parent))])
            prompt = (*parent[:cut], *conversation(turn, random_.choice([0, 1, 8, 60]))[1:])[:900]
            prompts.append(prompt)
            if turn % 5 == 4:
                cancel_half_way(model, prompt, steps=random_.randrange(1, 6))
                continue
            max_tokens = random_.choice([1, 8, 40])
            other.reset()
            assert text_of(model, prompt, max_tokens) == text_of(other, prompt, max_tokens), f"turn {turn}"


def cancel_half_way(model: LlamaModel, prompt: tuple[int, ...], *, steps: int) -> None:
    model.admit(sequence(prompt, 40, key="cancelled"))
    for _ in range(steps):
        model.step()
    model.cancel("cancelled")
