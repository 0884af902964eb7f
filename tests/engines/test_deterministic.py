"""With `ModelSpec.deterministic`, the numbers of a sequence are to the bit those that it has alone on a new model."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines import api
from engines.api import ModelSpec, SamplingParams
from engines.llamacpp.batch import TILE
from engines.llamacpp.choices import choices
from engines.llamacpp.model import LlamaModel
from engines.llamacpp.planner import Step
from testkit import tiny_gguf
from tests.engines.support import DEVICE, count_rows, output, run, sequence

WRITERS: dict[str, Callable[[Path], Path]] = {
    "llama": tiny_gguf.write_tiny_llama,
    "sliding window": tiny_gguf.write_tiny_swa,
    "recurrent": tiny_gguf.write_tiny_mamba,
}
SLOTS = 3
SHAPES = [
    ModelSpec(Path(), slots=SLOTS, ctx=512),
    ModelSpec(Path(), slots=SLOTS, ctx=512, flash_attn="off", swa_full=True),
    ModelSpec(Path(), slots=SLOTS, ctx=512, batch=TILE - 20, cache_type_k="f32", cache_type_v="f32"),
]
LENGTHS = (1, 5, TILE - 1, TILE, TILE + 1, 3 * TILE, 250)
"""Of prompts."""


class Recording(LlamaModel):
    """Keeps the bits of each sequence's logits."""

    def __init__(self, spec: ModelSpec, *, threads: int = 1) -> None:
        super().__init__(replace(spec, deterministic=True), replace(DEVICE, threads=threads))
        self.logits: dict[str, list[bytes]] = {}
        prepare, decode = self._planner.prepare, self._context.decode
        prepared: list[Step | None] = []

        def noted(beside: api.Beside) -> Step | None:
            prepared[:] = [prepare(beside)]
            return prepared[0]

        def decoded(n_rows: int) -> None:
            decode(n_rows)
            step = prepared[0]
            for slot, *_ in step.outputs if step is not None else ():
                assert slot.run is not None
                bits = np.array(self._context.logits(1)).tobytes()
                self.logits.setdefault(slot.run.sequence.key, []).append(bits)

        self._planner.prepare = noted  # type: ignore[method-assign]  # this object's alone
        self._context.decode = decoded  # type: ignore[method-assign]


@contextmanager
def recording(spec: ModelSpec, *, threads: int = 1) -> Iterator[Recording]:
    model = Recording(spec, threads=threads)
    try:
        yield model
    finally:
        model.close()


def one(number: int) -> api.Sequence:
    """A request; those with the same number are equal."""
    chance = random.Random(number % 5)  # some begin alike
    tokens = [chance.randrange(10, 60) for _ in range(LENGTHS[number % len(LENGTHS)])]
    sampling = SamplingParams(temperature=number % 3, seed=number, ignore_eos=True)
    return sequence(tokens, 3 + number % 20, key=str(number), sampling=sampling, urgent=bool(number % 2))


@pytest.fixture(scope="module", params=WRITERS)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    write = WRITERS[str(request.param)]
    return write(tmp_path_factory.mktemp("deterministic") / "tiny.gguf")


@pytest.mark.parametrize("shape", SHAPES, ids=["usual", "no flash attention", "small batch"])
def test_logits_are_those_of_a_sequence_alone_on_a_new_model(path: Path, shape: ModelSpec) -> None:
    numbers = range(21)
    alone: dict[str, list[bytes]] = {}
    for number in numbers:
        with recording(replace(shape, path=path)) as model:
            run(model, one(number))
            alone |= model.logits
    with recording(replace(shape, path=path)) as busy:
        chance = random.Random(1)
        waiting = [*numbers, *numbers, *numbers]
        chance.shuffle(waiting)
        seen = {}
        while waiting or busy.busy:
            if waiting and busy.free_slots and chance.random() < 0.3 and str(waiting[-1]) not in running(busy):
                number = waiting.pop()
                busy.logits.pop(str(number), None)
                busy.admit(one(number))
            if busy.busy and chance.random() < 0.02:
                busy.cancel(chance.choice(running(busy)))
            for event in busy.step():
                if event.finish:
                    seen[event.key] = busy.logits[event.key]
                    assert seen[event.key] == alone[event.key], event.key
        assert len(seen) == len(numbers)


def running(model: LlamaModel) -> list[str]:
    return [slot.run.sequence.key for slot in model._slots if slot.run is not None]


@settings(max_examples=15)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 40)), min_size=1, max_size=12))
def test_whatever_comes_before_and_beside(
    tmp_path_factory: pytest.TempPathFactory, arrivals: list[tuple[int, int]]
) -> None:
    """A number and the steps until the next one."""
    path = tmp_path_factory.getbasetemp() / "arrivals.gguf"
    if not path.exists():
        tiny_gguf.write_tiny_swa(path)
    spec = ModelSpec(path, slots=SLOTS, ctx=512)
    with recording(spec) as model:
        for place, (number, steps) in enumerate(arrivals):
            while not model.free_slots:
                model.step()
            model.admit(replace(one(number), key=f"{place} {number}"))
            for _ in range(steps):
                model.step()
        while model.busy:
            model.step()
        for key, bits in model.logits.items():
            with recording(spec) as new:
                run(new, replace(one(int(key.split()[1])), key="a"))
                assert new.logits["a"] == bits


def test_the_slots_take_turns_and_a_prompt_comes_in_chunks_of_one_size(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with recording(ModelSpec(path, slots=SLOTS, ctx=2048)) as model:
        chunk = min(choices(DEVICE).solo_chunk, model._context.n_rows)
        rows = count_rows(model, monkeypatch)
        model.admit(sequence([10, *[11] * 2 * chunk], 2, key="long", urgent=False))
        model.admit(sequence([10, 11], 4, key="short"))
        while model.busy:
            model.step()
        assert rows == [chunk, 2, chunk, 1, 1, 1, 1, 1]


def test_every_slot_has_its_turn(path: Path) -> None:
    with recording(ModelSpec(path, slots=SLOTS, ctx=512)) as model:
        for key in "abc":
            model.admit(sequence([10, 11], 3, key=key))
        turns = [event.key for _ in range(9) for event in output(model.step())]
        assert turns == [*"abc" * 3]


def test_nothing_is_kept_guessed_or_copied(path: Path) -> None:
    with recording(ModelSpec(path, slots=2, ctx=512)) as model:
        tokens = list(range(10, 60)) * 4
        for _ in range(3):
            model.admit(sequence(tokens, 5, key="a"))
            events = [event for _ in range(40) for event in model.step()]
            assert {event.tokens_cached for event in events} == {0}
        assert model.saved_bytes == 0
        assert model._speculation is None


def test_two_threads_compute_the_same_each_time(tmp_path: Path) -> None:
    """Only a few tokens: on a machine that others use, threads wait for each other."""
    spec = ModelSpec(tiny_gguf.write_tiny_llama(tmp_path / "tiny.gguf"), slots=2, ctx=512)
    alone: dict[str, list[bytes]] = {}
    for number in (3, 4):
        with recording(spec, threads=2) as model:
            run(model, one(number))
            alone |= model.logits
    with recording(spec, threads=2) as model:
        run(model, one(4), one(3))
        assert model.logits == alone
