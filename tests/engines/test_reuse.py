"""A prefix that is cached is not computed again, and the text is that of a cold run."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from engines.llamacpp.model import LlamaModel
from engines.llamacpp.slots import MIN_COPY
from testkit import tiny_gguf
from tests.engines.support import PROMPTS, count_rows, exact, finish, loaded, run, sequence, text_of, tokens_of

WRITERS = [
    tiny_gguf.write_tiny_llama,
    tiny_gguf.write_tiny_swa,
    tiny_gguf.write_tiny_mamba,
    tiny_gguf.write_tiny_lfm2,
]


def cold(model: LlamaModel, tokens: tuple[int, ...], max_tokens: int = 16) -> str:
    model.reset()
    return text_of(model, tokens, max_tokens)


def test_the_same_prompt_again_computes_only_its_last_token(
    tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = tokens_of(tiny_model_path, PROMPTS[9])
    with loaded(exact(tiny_model_path)) as model:
        first = text_of(model, prompt, 8)
        rows = count_rows(model, monkeypatch)
        assert text_of(model, prompt, 8) == first
    assert rows == [1] * 8


@pytest.mark.parametrize("write", WRITERS)
def test_a_longer_conversation_computes_only_what_is_new(
    write: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last output token was never fed to the model, so it is new too."""
    path = write(tmp_path / "model.gguf")
    prompt, more = tokens_of(path, PROMPTS[9]), tokens_of(path, PROMPTS[2])[1:]
    with loaded(exact(path)) as model:
        run(model, sequence(prompt, 8))
        longer = (*model._slots[0].cached, 400, *more)
        rows = count_rows(model, monkeypatch)
        warm = text_of(model, longer)
        assert sum(rows) == 1 + len(more) + 15
        assert warm == cold(model, longer)


def test_a_prefix_is_copied_from_a_slot_that_is_still_running(
    tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tokens_of(tiny_model_path, " ".join(PROMPTS[:8]))
    tails = [tokens_of(tiny_model_path, text)[1:] for text in PROMPTS[8:11]]
    with loaded(exact(tiny_model_path, slots=3)) as model:
        alone = [cold(model, shared + tail, 40) for tail in tails]
        model.reset()
        model.admit(sequence(shared + tails[0], 40, key="0"))
        outputs: dict[str, object] = {}
        events = [event for _ in range(12) for event in model.step()]
        rows = count_rows(model, monkeypatch)
        for n in (1, 2):
            model.admit(sequence(shared + tails[n], 40, key=str(n)))
        outputs = {key: output.text for key, output in finish(model).items()}
    outputs["0"] = "".join(event.text for event in events) + str(outputs["0"])
    assert [outputs[str(n)] for n in range(3)] == alone
    assert rows[0] <= 1 + len(tails[1]) + len(tails[2])


def test_a_recurrent_model_does_not_copy_and_does_not_cut_back(tmp_path: Path) -> None:
    path = tiny_gguf.write_tiny_mamba(tmp_path / "mamba.gguf")
    shared = tokens_of(path, " ".join(PROMPTS[:8]))
    with loaded(exact(path, slots=2)) as model:
        alone = cold(model, (*shared, 400, 401))
        model.reset()
        outputs = run(model, sequence((*shared, 500), key="0"), sequence((*shared, 400, 401), key="1"))
        assert outputs["1"].text == alone
        assert text_of(model, (*shared, 400, 401)) == alone


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("swa_full", [True, False], ids=["whole cache", "window only"])
def test_a_sliding_window_survives_any_cutting_back(
    tiny_swa_path: Path, swa_full: bool, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts branch off earlier ones at any point, far beyond the window of 32 and the 256 cells it gets."""
    random_ = random.Random(slots)
    spec = exact(tiny_swa_path, slots=slots, ctx=1024, batch=48, swa_full=swa_full)
    prompts: list[tuple[int, ...]] = [(1, *(random_.randrange(300, 750) for _ in range(600)))]
    with loaded(spec) as model, loaded(exact(tiny_swa_path, ctx=1024, batch=48)) as other:
        rows = count_rows(model, monkeypatch)
        asked = 0
        for _ in range(25):
            parent = random_.choice(prompts[-4:])
            fresh = (random_.randrange(300, 750) for _ in range(random_.choice([1, 8, 60, 300])))
            prompt = (*parent[: random_.randrange(1, len(parent))], *fresh)[:900]
            prompts.append(prompt)
            max_tokens = random_.choice([1, 8, 60])
            asked += len(prompt) + max_tokens - 1
            assert text_of(model, prompt, max_tokens) == cold(other, prompt, max_tokens)
    assert sum(rows) < 0.95 * asked


def test_a_window_that_is_gone_is_computed_again(tiny_swa_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = (1, *range(300, 700))
    for swa_full, first_rows in ((True, [1]), (False, [48])):
        with loaded(exact(tiny_swa_path, batch=48, swa_full=swa_full)) as model:
            text_of(model, prompt)
            rows = count_rows(model, monkeypatch)
            text_of(model, prompt[:101])
            assert rows[:1] == first_rows


def test_prompts_that_come_together_share_the_prefill_of_their_prefix(
    tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tokens_of(tiny_model_path, " ".join(PROMPTS[:8]))
    tails = [tokens_of(tiny_model_path, text)[1:] for text in PROMPTS[8:12]]
    with loaded(exact(tiny_model_path, slots=4, batch=32)) as model:
        alone = [cold(model, shared + tail, 12) for tail in tails]
        model.reset()
        rows = count_rows(model, monkeypatch)
        for key, tail in enumerate(tails):
            model.admit(sequence(shared + tail, 12, key=str(key)))
        texts = texts_of(model)
        assert [texts[str(key)] for key in range(4)] == alone
    assert sum(rows) == len(shared) + sum(map(len, tails)) + 4 * 11, "the shared prefix is computed once"


def test_followers_go_on_when_their_leader_is_cancelled(tiny_model_path: Path) -> None:
    shared = tokens_of(tiny_model_path, " ".join(PROMPTS[:8]))
    tails = [tokens_of(tiny_model_path, text)[1:] for text in PROMPTS[8:11]]
    with loaded(exact(tiny_model_path, slots=3, batch=16)) as model:
        alone = [cold(model, shared + tail, 12) for tail in tails]
        model.reset()
        for key, tail in enumerate(tails):
            model.admit(sequence(shared + tail, 12, key=str(key)))
        for _ in range(3):
            model.step()
        assert model.cancel("0")
        texts = texts_of(model)
    assert [texts["1"], texts["2"]] == alone[1:]


def test_a_person_does_not_wait_for_the_prefix_of_a_nightly_job(
    tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = tokens_of(tiny_model_path, " ".join(PROMPTS[:8]))
    with loaded(exact(tiny_model_path, slots=2, batch=32)) as model:
        model.admit(sequence((*prompt, 300), 4, key="job", urgent=False))
        model.admit(sequence((*prompt, 301), 4, key="person"))
        ended = [event.key for _ in range(200) for event in model.step() if event.finish]
    assert ended == ["person", "job"]


def texts_of(model: LlamaModel) -> dict[str, str]:
    """Step until everything has ended; the texts by key."""
    texts: dict[str, str] = {}
    while model.busy:
        for event in model.step():
            texts[event.key] = texts.get(event.key, "") + event.text
    return texts


@pytest.mark.parametrize("write", [tiny_gguf.write_tiny_llama, tiny_gguf.write_tiny_swa])
def test_a_cache_that_makes_room_for_a_stream_serves_on(
    write: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream of slot 2 moves into slot 1, between it and slot 0, and what was cached there into slot 3."""
    path = write(tmp_path / "model.gguf")
    prompts = [tokens_of(path, " ".join(PROMPTS[n : n + 4])) for n in (8, 10, 12)]
    assert len(prompts[1]) >= MIN_COPY
    with loaded(exact(path, slots=4)) as model:
        alone = [cold(model, prompts[n], 60) for n in (0, 2)]
    with loaded(exact(path, slots=4)) as model:
        for n, prompt in enumerate(prompts):
            model.admit(sequence(prompt, 60 if n != 1 else 4, key=str(n)))
        texts = texts_of(model)
        assert [texts["0"], texts["2"]] == alone
        longer = (*model._slots[3].cached, 400)
        assert longer[: len(prompts[1])] == prompts[1]
        rows = count_rows(model, monkeypatch)
        warm = text_of(model, longer)
        assert rows[0] == 1
        assert warm == cold(model, longer)
