"""Several tokens of a stream in one step: what is written is the same as without, by any guess and any settings."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engines import api
from engines.api import FinishReason, ModelSpec, SamplingParams
from engines.llamacpp.model import LlamaModel
from engines.llamacpp.outputs import Written
from engines.llamacpp.planner import Output as PlannedOutput
from engines.llamacpp.slots import Run, Slot
from engines.llamacpp.speculation import Depth
from engines.llamacpp.vocab import LlamaVocab
from testkit import tiny_gguf
from tests.engines.support import DEVICE, GREEDY, PROMPTS, Output, exact, finish, loaded, run, sequence, tokens_of

WRITERS = [tiny_gguf.write_tiny_llama, tiny_gguf.write_tiny_swa]
OUT = 40
CHOSEN = [
    GREEDY,
    SamplingParams(temperature=0, repeat_penalty=1.3),
    SamplingParams(temperature=1.0, seed=5),
    SamplingParams(temperature=0.7, seed=6, repeat_penalty=1.1, top_k=5),
    SamplingParams(temperature=1.3, seed=7, top_k=0, top_p=1, min_p=0),
    SamplingParams(temperature=1.0, seed=8, top_k=0, top_p=0.6, min_p=0, ignore_eos=True),
]

Logits = npt.NDArray[np.float32]

Source = Callable[[Run, int], Sequence[int]]
"""A guess for a run, of at most so many tokens."""


class Guessing(LlamaModel):
    """A model whose streams guess in every step, as they are told to.

    Attributes:
        checked: Guesses in the steps so far.
    """

    def __init__(self, spec: ModelSpec, source: Source) -> None:
        super().__init__(replace(spec, speculate=True), DEVICE)
        assert self._speculation is not None
        self.checked = 0
        self._source = source
        self._speculation.guess = self._guess  # type: ignore[method-assign]  # this object's alone

    def _guess(self, streams: Sequence[Run], *_: object, **__: object) -> Depth:
        room = self._context.n_guesses // len(streams)
        for one in streams:
            one.guess = tuple(self._source(one, min(room, one.sequence.max_tokens - one.tokens_out - 1)))
            self.checked += len(one.guess)
        return Depth(1, tuple(range(len(streams)))) if any(one.guess for one in streams) else Depth(0, ())


def written_by(model: LlamaModel, *sequences: api.Sequence) -> dict[str, tuple[str, FinishReason | None, int]]:
    outputs = run(model, *sequences)
    return {key: (output.text, output.finish, output.tokens_out) for key, output in outputs.items()}


def asked(path: Path, count: int = 4) -> list[api.Sequence]:
    prompts = [tokens_of(path, text) for text in PROMPTS[:count]]
    return [
        sequence(prompt, OUT, key=str(n), sampling=CHOSEN[n % len(CHOSEN)], stop=("river",) if n == 3 else ())
        for n, prompt in enumerate(prompts)
    ]


def tokens_written(model: LlamaModel, *sequences: api.Sequence) -> dict[str, list[int]]:
    """The tokens that each of them chooses."""
    tokens: dict[str, list[int]] = {}
    accept = model._outputs._accept

    def noted(one: Written, token: int) -> None:
        tokens.setdefault(one.run.sequence.key, []).append(token)
        accept(one, token)

    model._outputs._accept = noted  # type: ignore[method-assign]  # this object's alone
    run(model, *sequences)
    return tokens


@pytest.fixture(scope="module", params=WRITERS, ids=lambda write: write.__name__)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    written: Path = request.param(tmp_path_factory.mktemp("models") / "model.gguf")
    return written


def mixed(right: dict[str, list[int]], pattern: Sequence[bool]) -> Source:
    """Guesses of which every so many are right."""

    def source(one: Run, most: int) -> list[int]:
        key, at = one.sequence.key, one.tokens_out
        guesses = right[key][at : at + min(most, 1 + len(pattern))]
        return [
            token if good else (token + 1) % 300
            for token, good in zip(guesses, itertools.islice(itertools.cycle(pattern), at, None), strict=False)
        ]

    return source


@pytest.mark.parametrize(
    "pattern",
    [[True] * 7, [False] * 7, [True, True, False], [True] * 4 + [False], [False] + [True] * 3],
    ids=["all right", "all wrong", "two right", "four right", "the first wrong"],
)
@pytest.mark.parametrize("swa_full", [True, False], ids=["whole cache", "window"])
def test_they_change_nothing(path: Path, pattern: list[bool], swa_full: bool) -> None:
    """Four streams at once, each sampled otherwise, longer than the window of the model that has one."""
    spec = exact(path, slots=4, ctx=256, swa_full=swa_full)
    with loaded(spec) as model:
        right = tokens_written(model, *asked(path))
    with loaded(spec) as model:
        expected = written_by(model, *asked(path))
    with closing(Guessing(spec, mixed(right, pattern))) as model:
        assert written_by(model, *asked(path)) == expected
        assert model.checked > 60
        slots = [list(slot.cached) for slot in model._slots]
        model._speculation = None
        assert written_by(model, *asked(path)) == expected, "what is left in the slots is what was written"
    assert all(len(cached) <= len(one.tokens) + OUT for cached, one in zip(slots, asked(path), strict=True))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    guesses=st.lists(st.lists(st.integers(0, 9), max_size=7), min_size=1, max_size=12), params=st.sampled_from(CHOSEN)
)
def test_nor_does_any_mixture_of_right_and_wrong_ones(
    path: Path, guesses: list[list[int]], params: SamplingParams
) -> None:
    asked_for = [replace(one, sampling=params, stop=()) for one in asked(path, 2)]
    spec = exact(path, slots=2, ctx=128)
    with loaded(spec) as model:
        right = tokens_written(model, *asked_for)
    turns = itertools.cycle(guesses)

    def source(one: Run, most: int) -> list[int]:
        at = one.tokens_out
        following = right[one.sequence.key][at : at + most]
        return [token if right_one else 5 for token, right_one in zip(following, next(turns), strict=False)]

    with closing(Guessing(spec, source)) as model:
        assert tokens_written(model, *asked_for) == right


def test_what_ends_a_stream_ends_it_in_the_middle_of_right_guesses(path: Path) -> None:
    spec = exact(path, slots=2, ctx=256)
    prompt = tokens_of(path, PROMPTS[0])
    with loaded(spec) as model:
        right = tokens_written(model, sequence(prompt, OUT))
        whole = run(model, sequence(prompt, OUT))["a"].text
    for cut in range(1, 12):
        stop = whole[cut : cut + 3]
        with loaded(spec) as model:
            expected = written_by(model, sequence(prompt, OUT, stop=(stop,)), sequence(prompt, cut, key="b"))
        with closing(Guessing(spec, mixed({"a": right["a"], "b": right["a"]}, [True] * 9))) as guessing:
            told = written_by(guessing, sequence(prompt, OUT, stop=(stop,)), sequence(prompt, cut, key="b"))
        assert told == expected


def test_a_step_tells_all_that_it_wrote_at_once(path: Path) -> None:
    spec = exact(path, ctx=256)
    prompt = tokens_of(path, PROMPTS[1])
    with loaded(spec) as model:
        right = tokens_written(model, sequence(prompt, OUT))
    with closing(Guessing(spec, mixed(right, [True] * 7))) as model:
        events = run(model, sequence(prompt, OUT))["a"].events
    assert [event.tokens_out for event in events] == [1, 2, *range(11, OUT, 9), OUT]
    assert all(event.index < event.tokens_out for event in events)


def test_characters_of_several_tokens_stay_whole(tmp_path: Path) -> None:
    """Bytes as tokens: half a character at the end of a step is held back."""
    path = tiny_gguf.write_tiny_llama(tmp_path / "model.gguf")
    vocab = LlamaVocab(path)
    script = vocab.tokenize("日本語 🙂 é")[1:]
    vocab.close()
    for size in range(1, 8):
        rest = iter(script)
        at = 0

        def source(one: Run, most: int, size: int = size) -> list[int]:
            return script[one.tokens_out : one.tokens_out + min(most, size)]

        with closing(Guessing(exact(path), source)) as model:
            model._outputs._chooser.choose = lambda *_, rest=rest: [next(rest)]  # type: ignore[method-assign]
            output = run(model, sequence(tokens_of(path, "a"), len(script)))["a"]
        assert output.text.strip() == "日本語 🙂 é", at
        assert all("�" not in event.text for event in output.events)


def test_json_is_the_same_whatever_is_guessed(path: Path) -> None:
    schema = {
        "type": "object",
        "properties": {
            "river": {"enum": ["otter", "trout"]},
            "count": {"type": "integer", "minimum": 0, "maximum": 99},
        },
        "required": ["river", "count"],
        "additionalProperties": False,
    }
    with closing(LlamaVocab(path)) as vocab:
        asked_for = [
            replace(sequence(tokens_of(path, text), 90, key=str(n), sampling=CHOSEN[n]), grammar=vocab.grammar(schema))
            for n, text in enumerate(PROMPTS[:3])
        ]
        spec = exact(path, slots=3, ctx=256)
        with loaded(spec) as model:
            right = tokens_written(model, *asked_for)
        for pattern in ([True] * 7, [True, True, False], [False]):
            with closing(Guessing(spec, mixed(right, pattern))) as model:
                outputs = run(model, *asked_for)
            for output in outputs.values():
                assert json.loads(output.text)["river"] in ("otter", "trout")
                assert output.finish is FinishReason.STOP
            assert {key: output.tokens_out for key, output in outputs.items()} == {
                key: len(tokens) for key, tokens in right.items()
            }


def test_forced_tokens_are_taken_several_a_step(path: Path) -> None:
    schema = {
        "type": "object",
        "properties": {"the river": {"const": "and the river and the river"}},
        "required": ["the river"],
        "additionalProperties": False,
    }
    with closing(LlamaVocab(path)) as vocab:
        asked_for = replace(sequence(tokens_of(path, PROMPTS[0]), 90), grammar=vocab.grammar(schema))
        with loaded(exact(path, ctx=256)) as model:
            expected = run(model, asked_for)["a"]
        with Ticking(replace(exact(path, ctx=256), speculate=True)) as model:
            run(model, sequence(tokens_of(path, PROMPTS[1]), 4, key="first"))
            output = run(model, asked_for)["a"]
    assert output.text == expected.text
    assert json.loads(output.text) == {"the river": "and the river and the river"}
    assert len(output.events) < len(expected.events) / 2


class Ticking:
    """A model for which any step takes as long as any other: whatever may be right is worth a guess."""

    def __init__(self, spec: ModelSpec) -> None:
        ticks = itertools.count()
        self.model = LlamaModel(spec, DEVICE, clock=lambda: next(ticks) / 1000)

    def __enter__(self) -> LlamaModel:
        return self.model

    def __exit__(self, *_: object) -> None:
        self.model.close()


def count_guesses(model: LlamaModel) -> list[int]:
    """Those of each step from now on."""
    counts: list[int] = []
    take = model._outputs.take

    def counted(outputs: Sequence[PlannedOutput]) -> list[api.StepEvent]:
        counts.append(sum(len(output.guess) for output in outputs))
        return take(outputs)

    model._outputs.take = counted  # type: ignore[method-assign]  # this object's alone
    return counts


def follow_script(model: LlamaModel, scripts: Mapping[str, Sequence[int]]) -> dict[str, list[Logits]]:
    """Have each sequence write this, and keep the logits that it had to choose from."""
    rows: dict[str, list[Logits]] = {}
    choose = model._outputs._choose

    def scripted(written: Sequence[Written], logits: Logits, damaged: list[Slot]) -> list[Written]:
        for one in written:
            rows.setdefault(one.run.sequence.key, []).append(logits[one.row].copy())
        tokens: list[int | None] = [scripts[one.run.sequence.key][one.run.tokens_out] for one in written]
        model._outputs._chooser.choose = lambda *_: tokens  # type: ignore[method-assign]
        return choose(written, logits, damaged)

    model._outputs._choose = scripted  # type: ignore[method-assign]
    return rows


def changed(text: Sequence[int], *, every: int, first: int) -> list[int]:
    return [token if place % every != first else 7 + first for place, token in enumerate(text)]


def test_a_text_that_is_written_again_takes_few_steps_and_computes_the_same(path: Path) -> None:
    """Four streams that come one after another, with changes in what they copy; one leaves; prompts in between."""
    texts = [tokens_of(path, " ".join(PROMPTS[n : n + 6])) for n in range(6)]
    scripts = {
        str(n): [token if place % 11 != n else 7 + n for place, token in enumerate(text)]
        for n, text in enumerate(texts)
    }
    wanted = [sequence(text, len(text) - 1, key=str(n)) for n, text in enumerate(texts)]
    spec = exact(path, slots=4, batch=24)
    with loaded(spec) as model:
        expected = follow_script(model, scripts)
        for one in wanted:
            model.reset()
            run(model, one)
    with Ticking(replace(spec, speculate=True)) as model:
        rows, guesses = follow_script(model, scripts), count_guesses(model)
        outputs: dict[str, Output] = {}
        waiting = list(wanted)
        while waiting or model.busy:
            if waiting and model.free_slots:
                model.admit(waiting.pop(0))
            for event in itertools.chain.from_iterable(model.step() for _ in range(3) if model.busy):
                outputs.setdefault(event.key, Output()).events.append(event)
            if "3" in rows and len(rows["3"]) > 20:
                model.cancel("3")
    assert sum(guesses) > 100
    for key, chosen_from in expected.items():
        seen = rows[key]
        assert len(seen) == len(chosen_from) or key == "3"
        assert max(np.abs(a - b).max() for a, b in zip(seen, chosen_from, strict=False)) < 0.01, key
    steps = [sum(event.tokens_out > 0 for event in output.events) for output in outputs.values()]
    assert sum(steps) < sum(map(len, rows.values())) / 2


@pytest.mark.parametrize("write", [tiny_gguf.write_tiny_mamba], ids=["recurrent"])
def test_a_memory_that_cannot_be_cut_does_not_guess(write: Callable[[Path], Path], tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf")
    with loaded(replace(exact(path), speculate=True)) as model:
        assert model._speculation is None
        assert run(model, sequence(tokens_of(path, PROMPTS[0]), 30))["a"].finish is FinishReason.LENGTH


def test_a_setting_turns_it_off(path: Path) -> None:
    text = tokens_of(path, " ".join(PROMPTS[:4]))
    with Ticking(exact(path)) as model:
        follow_script(model, {"a": text})
        guesses = count_guesses(model)
        run(model, sequence(text, len(text) - 1))
        assert sum(guesses) == 0
        assert model._context.n_guesses == 0


def test_a_model_that_cannot_take_a_guess_back_fails_the_step(path: Path) -> None:
    with closing(Guessing(exact(path), lambda one, most: [5] * min(most, 2))) as model:
        model._context.keep = lambda *_: False  # type: ignore[method-assign]
        model.admit(sequence(tokens_of(path, PROMPTS[0]), 9))
        with pytest.raises(Exception, match="taken back"):
            finish(model)
        model.reset()
        assert not model.busy


def logits_of(
    model: LlamaModel, prompts: Sequence[Sequence[int]], scripts: Mapping[str, Sequence[int]]
) -> list[Logits]:
    rows = follow_script(model, scripts)
    run(model, *(sequence(prompt, OUT, key=str(n)) for n, prompt in enumerate(prompts)))
    return [np.array(rows[str(n)]) for n in range(len(prompts))]


@pytest.mark.parametrize("name", ["tiny", "smollm2"])
def test_guesses_only_round_otherwise(
    name: str, request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> None:
    """With more rows llama.cpp's kernels add in another order, as they do where a prompt is cut otherwise.

    No token differed where this was written. One that does is between two logits that are as near as rounding goes.
    """
    path = request.getfixturevalue("smollm2_path" if name == "smollm2" else "tiny_model_path")
    spec = ModelSpec(path, slots=4, ctx=256, speculate=False)
    prompts = [tokens_of(path, text) for text in PROMPTS[:4]]
    with loaded(spec) as model:
        written = tokens_written(model, *(sequence(prompt, OUT, key=str(n)) for n, prompt in enumerate(prompts)))
    scripts = {key: tokens + [tokens[-1]] * (OUT - len(tokens)) for key, tokens in written.items()}
    with loaded(spec) as model:
        plain = logits_of(model, prompts, scripts)
    with closing(Guessing(spec, mixed({key: list(tokens) for key, tokens in scripts.items()}, [True] * 7))) as model:
        guessed = logits_of(model, prompts, scripts)
        assert model.checked > 100
    change = max(float(np.abs(a - b).max()) for a, b in zip(plain, guessed, strict=True))
    differing = [
        (n, place, float(a[place].max() - a[place][b[place].argmax()]))
        for n, (a, b) in enumerate(zip(plain, guessed, strict=True))
        for place in range(len(a))
        if a[place].argmax() != b[place].argmax()
    ]
    record_property("logits change by", change)
    print(f"{name}: logits change by {change:.2g} at most; other tokens at {differing}")
    assert change < 0.5
    assert all(gap <= 2 * change for *_, gap in differing)
