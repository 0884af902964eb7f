"""Whether a model answers the same in a busy server as it does alone.

`compare` lets one slot of an empty context answer each of some prompts, then serves all of them at once: with few
slots, prompts that continue, share and repeat one another, tasks that are cancelled, sequences that move, and guesses
that are right or wrong. Tokens are chosen by the highest logit, and all logits are compared. llama.cpp rounds otherwise
where a prompt is cut otherwise, so how much that alone changes is measured first: what changes more is a fault, and so
is much.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from unittest import mock

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader

from engines.api import DeviceSpec, ModelSpec, SamplingParams
from engines.api import Sequence as EngineSequence
from engines.llamacpp.model import LlamaModel
from engines.llamacpp.outputs import Written
from engines.llamacpp.slots import Run, Slot
from engines.llamacpp.speculation import NOTHING, Depth

Rows = npt.NDArray[np.float32]

CTX: Final = 512
"""Tokens a slot, more than a sliding window keeps."""
SHORT_CTX: Final = 256
"""For models that have learnt positions one by one, and no more of them."""
BATCHES: Final = 64, 24, 9, 4
"""Most rows in a step: where a prompt is cut."""
SERVED_BATCH: Final = 40
SLACK: Final = 8.0
"""How many times as much as another cut changed may change in a busy server: few cuts of few prompts are measured."""
MOST_ROUNDING: Final = 0.05
"""What another cut may change at most, as a share of the logits' standard deviation: more is no rounding."""
ROUNDING: Final = 1e-3
"""What may change in any case, as a share of the logits' standard deviation: flash attention computes with half floats,
and two models that changed 1e-3 with it changed 1e-6 without."""
ANSWER: Final = 12
GUESSES: Final = 3
"""Tokens of a stream that are guessed in each step."""
GREEDY: Final = SamplingParams(temperature=0)


@dataclass(frozen=True)
class Task:
    """A prompt, and what becomes of it.

    Attributes:
        tokens: The prompt.
        answer: Output tokens.
        at: The step before which it comes.
        leaves: It is cancelled after so many steps; None if it is not.
    """

    tokens: tuple[int, ...]
    answer: int
    at: int
    leaves: int | None = None

    def fits(self, ctx: int) -> bool:
        """Whether a slot of so many tokens has room for it."""
        return len(self.tokens) + self.answer <= ctx


@dataclass(frozen=True)
class Outcome:
    """What a comparison found.

    Attributes:
        answers: Answers compared.
        rounding: The most that a logit changed where prompts were only cut otherwise, in standard deviations.
        change: The most that one changed in a busy server.
        departures: Answers that went on with another token.
        gap: The farthest apart that the two logits were where one did.
        reused: Prompt tokens that were not computed again.
        copies: Caches that were copied.
        guessed: Tokens that were guessed.
    """

    answers: int
    rounding: float
    change: float
    departures: int
    gap: float
    reused: int
    copies: int
    guessed: int

    @property
    def alike(self) -> bool:
        """Whether everything that differs is rounding."""
        if not self.rounding <= MOST_ROUNDING:
            return False
        return self.change <= max(ROUNDING, SLACK * self.rounding)  # not with NaN

    @property
    def told(self) -> str:
        """All of it in one line."""
        return (
            f"changes {self.change:.1e}, cutting alone {self.rounding:.1e}; other tokens in {self.departures} of "
            f"{self.answers} answers{f', {self.gap:.1e} apart' if self.departures else ''}; "
            f"{self.reused} tokens reused, {self.copies} copies, {self.guessed} tokens guessed"
        )


def compare(spec: ModelSpec, *, threads: int = 1, seed: int = 0) -> Outcome:
    """See above. Raises `engines.errors.EngineError` where the model cannot be loaded or a step fails."""
    spec = dataclasses.replace(spec, ctx=SHORT_CTX if _learns_positions(spec.path) else CTX)
    device = DeviceSpec("cpu", threads=threads)
    with _opened(dataclasses.replace(spec, slots=1, batch=BATCHES[0]), device) as alone:
        tasks = [task for task in _tasks(np.random.default_rng(seed), alone) if task.fits(spec.ctx)]
        expected = [_alone(alone, task.tokens, task.answer) for task in tasks]
    changes = []
    for batch in BATCHES[1:]:
        with _opened(dataclasses.replace(spec, slots=1, batch=batch), device) as alone:
            cut = [_alone(alone, task.tokens, task.answer) for task in tasks]
        changes += [_change(*pair) for pair in zip(expected, cut, strict=True)]
    rounding = max(change for change, _ in changes)
    with _opened(dataclasses.replace(spec, batch=SERVED_BATCH), device) as model:
        model.guess_from({str(n): rows.argmax(axis=1).tolist() for n, rows in enumerate(expected)})
        seen, reused, copies = _serve(model, tasks)
        guessed = model.guessed
    served = [_change(*pair) for pair in zip(expected, seen, strict=True)]
    gaps = [gap for _, gap in served if gap is not None]
    return Outcome(
        answers=len(tasks),
        rounding=rounding,
        change=float(np.max([change for change, _ in served])),  # NaN, if there is one
        departures=len(gaps),
        gap=max(gaps, default=0.0),
        reused=reused,
        copies=copies,
        guessed=guessed,
    )


def _learns_positions(path: Path) -> bool:
    return any(tensor.name == "position_embd.weight" for tensor in GGUFReader(path).tensors)


class _Observed(LlamaModel):
    """A model that shows the logits from which it takes each sequence's tokens."""

    rows: dict[str, list[Rows]]
    guessed = 0

    def observe(self) -> None:
        """Keep them from now on, one row for each token."""
        self.rows = {}
        choose = self._outputs._choose

        def observed(written: Sequence[Written], logits: Rows, damaged: list[Slot]) -> list[Written]:
            for one in written:
                self.rows.setdefault(one.run.sequence.key, []).append(logits[one.row].copy())
            return choose(written, logits, damaged)

        self._outputs._choose = observed  # type: ignore[method-assign]  # this object's alone

    def guess_from(self, answers: Mapping[str, Sequence[int]]) -> None:
        """Guess what these sequences write, every other time with one that is wrong; not if it cannot be taken back."""

        def guess(streams: Sequence[Run], *_: object, **__: object) -> Depth:
            for number, run in enumerate(streams):
                at, left = run.tokens_out, run.sequence.max_tokens - run.tokens_out - 1
                guess = list(answers[run.sequence.key][at : at + min(left, GUESSES)])
                if guess and (at + number) % 2:
                    guess[len(guess) // 2] = (guess[len(guess) // 2] + 1) % self._native.n_vocab
                run.guess = guess
                self.guessed += len(guess)
            return Depth(GUESSES, tuple(range(len(streams)))) if any(run.guess for run in streams) else NOTHING

        if self._speculation is not None:
            self._speculation.guess = guess  # type: ignore[method-assign]  # this object's alone

    def cached(self, key: str) -> int:
        """Tokens of a sequence that are in its slot."""
        return next(len(slot.cached) for slot in self._slots if slot.run is not None and slot.run.sequence.key == key)


@contextlib.contextmanager
def _opened(spec: ModelSpec, device: DeviceSpec) -> Iterator[_Observed]:
    ticks = itertools.count()
    model = _Observed(spec, device, clock=lambda: next(ticks) / 1000)  # what is learnt from time is the same each time
    model.observe()
    try:
        yield model
    finally:
        model.close()


def _tasks(rng: np.random.Generator, model: _Observed) -> list[Task]:
    """Prompts that begin alike, conversations that go on, and strangers, some of which leave."""
    vocabulary = model._native.n_vocab

    def text(length: int) -> tuple[int, ...]:
        return tuple(int(token) for token in rng.integers(0, vocabulary, length))

    def answered(prompt: tuple[int, ...]) -> tuple[int, ...]:
        return (*prompt, *(int(row.argmax()) for row in _alone(model, prompt, ANSWER)))

    system = text(44)
    first = [system + text(length) for length in (30, 17, 3)]
    stranger = text(61)
    long = text(330)
    turns = [answered(prompt) + text(9) for prompt in first]
    again = [answered(prompt) + text(5) for prompt in turns]
    prompts: list[tuple[tuple[int, ...], int, int | None]] = [
        (first[0], 4, None),
        (first[1], ANSWER, None),
        (stranger, 40, 6),
        (first[2], 40, None),
        (text(1), ANSWER, None),
        (turns[0], ANSWER, None),
        (text(120), ANSWER, 2),
        (turns[1], 30, None),
        (first[0][:60] + text(20), ANSWER, None),
        (again[0], ANSWER, None),
        (stranger[:50] + text(3), ANSWER, None),
        (turns[0], 5, None),
        (turns[0][:-3], ANSWER, None),
        (turns[2], ANSWER, 3),
        (again[2], 20, None),
        (stranger, ANSWER, None),
        (again[1], ANSWER, None),
        (answered(stranger) + text(70), ANSWER, None),
        (system, ANSWER, None),
        (system[:40], ANSWER, None),
        (long, 20, None),
        (long[:290] + text(20), ANSWER, None),
        (long[:90] + text(20), ANSWER, None),
        (again[1] + text(30), ANSWER, None),
    ]
    ats = np.cumsum([0, 0, 0, 0, *rng.integers(0, 9, len(prompts) - 4)])
    return [Task(prompt, answer, int(at), leaves) for (prompt, answer, leaves), at in zip(prompts, ats, strict=True)]


def _alone(model: _Observed, prompt: tuple[int, ...], answer: int) -> Rows:
    """Logits of each token of the answer that an empty model gives, shape (tokens, n_vocab)."""
    model.reset()
    model.rows.clear()
    model.admit(EngineSequence("alone", prompt, answer, sampling=GREEDY))
    while model.busy:
        model.step()
    return np.array(model.rows["alone"])


def _serve(model: _Observed, tasks: Sequence[Task]) -> tuple[list[Rows], int, int]:
    """Logits of all answers, as far as they went; prompt tokens used again; copies."""
    waiting, began, reused = list(enumerate(tasks)), dict[str, int](), 0
    with mock.patch.object(model._context, "copy_slot", wraps=model._context.copy_slot) as copy_slot:
        for step in itertools.count():
            while waiting and waiting[0][1].at <= step and model.free_slots:
                number, task = waiting.pop(0)
                model.admit(EngineSequence(str(number), task.tokens, task.answer, sampling=GREEDY))
                began[str(number)] = step
                reused += model.cached(str(number))
            if not waiting and not model.busy:
                break
            for key, since in began.items():
                if tasks[int(key)].leaves == step - since:
                    model.cancel(key)
            model.step()
    empty = np.empty((0, model._native.n_vocab), np.float32)
    rows = [np.array(model.rows[key]) if key in model.rows else empty for key in map(str, range(len(tasks)))]
    return rows, reused, copy_slot.call_count


def _change(expected: Rows, seen: Rows) -> tuple[float, float | None]:
    """The most that a logit changed; how far the two were apart where another token came of it, None if none did."""
    most = 0.0
    for here, there in zip(expected, seen, strict=False):
        spread = float(here.std())
        most = float(np.maximum(most, np.abs(here - there).max() / spread))
        one, other = here.argmax(), there.argmax()
        if one != other:  # the answers part, and what comes after has another history
            return most, float(here[one] - here[other]) / spread
    return most, None
