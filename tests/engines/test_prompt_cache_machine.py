"""Whatever happens to conversations and their model, a cached beginning gives the text of a cold run."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from engines.api import FinishReason, ModelSpec
from engines.errors import DecodeFailed
from engines.llamacpp.model import LlamaModel
from engines.llamacpp.prefix_tree import common_prefix
from testkit import tiny_gguf
from tests.engines.support import DEVICE, exact, sequence, text_of

WRITERS: dict[str, Callable[..., Path]] = {
    "attention": functools.partial(tiny_gguf.write_tiny_llama, head=32),  # as a quantised cache needs
    "window": functools.partial(tiny_gguf.write_tiny_swa, head=32),
    "mamba": tiny_gguf.write_tiny_mamba,
    "hybrid with a window": functools.partial(tiny_gguf.write_tiny_lfm2, head=32),
}
CTX = 1024


@functools.cache
def folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="conversations-"))


@functools.cache
def written(kind: str, seed: int) -> Path:
    return WRITERS[kind](folder() / f"{kind}-{seed}.gguf", seed=seed)


def shape(path: Path, cache_type: str, *, slots: int) -> ModelSpec:
    base = exact(path, slots=slots, ctx=CTX, batch=96, swa_full=False)
    base = dataclasses.replace(base, cache_type_k=cache_type, cache_type_v=cache_type)
    return dataclasses.replace(base, flash_attn="on") if cache_type == "q8_0" else base


@functools.cache
def cold_text(path: Path, cache_type: str, prompt: tuple[int, ...], max_tokens: int) -> str:
    model = cold_model(path, cache_type)
    model.reset()
    return text_of(model, prompt, max_tokens)


@functools.cache
def cold_model(path: Path, cache_type: str) -> LlamaModel:
    return LlamaModel(dataclasses.replace(shape(path, cache_type, slots=1), prompt_cache_mib=0), DEVICE)


def fail(n_rows: int) -> None:
    raise DecodeFailed("test")


@dataclass
class Task:
    prompt: tuple[int, ...]
    max_tokens: int
    text: str = ""


class Conversations(RuleBasedStateMachine):
    """Tasks on a model with a prompt cache of 1 MiB, and each one's text from a model without one."""

    kind = "attention"
    cache_type = "f16"

    @initialize(slots=st.integers(1, 3))
    def start(self, slots: int) -> None:
        self.slots = slots
        self.seed = 0
        self.tasks: dict[str, Task] = {}
        self.keys = (str(number) for number in itertools.count())
        self.prompts = [self.words(number, 400) for number in range(2)]
        self.load()

    def load(self) -> None:
        spec = dataclasses.replace(shape(self.path, self.cache_type, slots=self.slots), prompt_cache_mib=1)
        self.model = LlamaModel(spec, DEVICE, clock=lambda: 0.0)
        self.model._saver._save_s = self.model._saver._restore_s = 0.0  # copies cost nothing: all is saved that may be

    @property
    def path(self) -> Path:
        return written(self.kind, self.seed)

    def words(self, seed: int, count: int) -> tuple[int, ...]:
        random_ = random.Random(seed)
        return tuple(random_.randrange(300, 750) for _ in range(count))

    def submit(self, prompt: tuple[int, ...], max_tokens: int) -> None:
        self.prompts = [*self.prompts[-7:], prompt]
        key = next(self.keys)
        self.tasks[key] = Task(prompt, max_tokens)
        self.model.admit(sequence(prompt, max_tokens, key=key))

    free = precondition(lambda self: self.model.free_slots > 0)
    busy = precondition(lambda self: self.tasks)

    @free
    @rule(
        parent=st.integers(0, 7),
        keep=st.one_of(st.just(1.0), st.floats(0.05, 1)),
        more=st.sampled_from([0, 1, 8, 60]),
        max_tokens=st.sampled_from([1, 6, 40]),
        steps=st.sampled_from([1000, 1000, 3, 0]),
    )
    def ask(self, parent: int, keep: float, more: int, max_tokens: int, steps: int) -> None:
        """A conversation goes on, forks, repeats or is shortened; it is waited for, or others come meanwhile."""
        prompt = self.prompts[-1 - parent % len(self.prompts)]
        kept = prompt[: max(1, int(keep * len(prompt)))]
        self.submit((*kept, *self.words(parent + more, more))[: CTX - 41], max_tokens)
        self.step(steps)

    @busy
    @rule(count=st.integers(1, 8))
    def step(self, count: int) -> None:
        for _ in range(count):
            for event in self.model.step():
                task = self.tasks[event.key]
                task.text += event.text
                if event.finish is not None:
                    assert event.finish in (FinishReason.LENGTH, FinishReason.STOP)
                    assert task.text == cold_text(self.path, self.cache_type, task.prompt, task.max_tokens)
                    del self.tasks[event.key]

    @busy
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.tasks)))
        assert self.model.cancel(key)
        del self.tasks[key]

    @rule(weights=st.sampled_from(["same"] * 3 + ["other"]))
    def start_again(self, weights: str) -> None:
        """A step fails, as when a GPU is lost, and the worker resets the model; or other weights are loaded."""
        if weights == "other":
            self.model.close()
            self.seed = 1 - self.seed
            self.load()
        elif self.tasks:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(self.model._context, "decode", fail)
                with pytest.raises(DecodeFailed):
                    self.model.step()
            self.model.reset()
        else:
            return
        self.tasks.clear()
        assert self.model.saved_bytes == 0

    @invariant()
    def what_is_known_is_what_the_slots_hold(self) -> None:
        prompt = list(self.prompts[-1])
        slots, known = self.model._slots, self.model._prefixes._index.find(prompt)
        assert known.held == [common_prefix(prompt, slot.cached) for slot in slots]

    @invariant()
    def what_is_saved_is_within_its_bound(self) -> None:
        assert self.model.saved_bytes <= 1 << 20

    def teardown(self) -> None:
        if hasattr(self, "model"):
            self.model.close()


@pytest.mark.parametrize("cache_type", ["f16", "q8_0"])
@pytest.mark.parametrize("kind", WRITERS)
def test_any_turns_give_the_text_of_a_cold_run(kind: str, cache_type: str) -> None:
    class Machine(Conversations):
        pass

    Machine.kind, Machine.cache_type = kind, cache_type
    run_state_machine_as_test(Machine, settings=settings(max_examples=15, stateful_step_count=30, deadline=None))
