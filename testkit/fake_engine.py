"""An engine without a model: deterministic text, steps when the test says so, faults on order.

A task's text is its first prompt token, then how far it has come: ``"<7.0>", "<7.1>", ...``. One step brings every
sequence one token further.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path

from engines.api import (
    ALONE,
    NO_ARGUMENTS,
    Beside,
    DeviceSpec,
    FinishReason,
    Footprint,
    ModelSpec,
    ProgressCallback,
    Prompt,
    Sequence,
    StepEvent,
    TemplateArgument,
    WaitCallback,
)
from engines.errors import InvalidPrompt, LoadFailed


class Hang(Exception):
    """Scripted instead of a fault: the step waits until it is released, then goes on as if nothing had been."""

    def __init__(self) -> None:
        super().__init__("hangs")
        self.began = threading.Event()
        self.release = threading.Event()


class FakeVocab:
    """One token a character; an empty prompt and one that holds ``refuse`` are refused."""

    def __init__(self) -> None:
        self.closes = 0

    def tokenize(self, prompt: str, *, at_most: int | None = None) -> list[int]:
        if not prompt or "refuse" in prompt:
            raise InvalidPrompt("the fake vocabulary refuses this prompt")
        return [ord(char) for char in prompt]

    def tokenize_chat(
        self,
        messages: Seq[Mapping[str, str]],
        *,
        arguments: Mapping[str, TemplateArgument] = NO_ARGUMENTS,
        at_most: int | None = None,
    ) -> Prompt:
        text = "".join(f"{message['role']}:{message['content']}\n" for message in messages)
        return Prompt(self.tokenize(text), reply="")

    def close(self) -> None:
        self.closes += 1


class FakeModel:
    """A loaded model. With a gate each step waits for one permit; without one it never waits.

    Attributes:
        step_faults: What the next steps raise, or None for a good one; when it is empty all are good.
        always: What every step raises that `step_faults` says nothing about.
        not_numbers: Task keys for which the next step computes no logits.
        admit_faults: Task key to what its admission raises.
        reset_faults: What the next resets raise.
        beside: What the model was told in each step that the others do.
        thinks: How many tokens of a reply to a conversation are reasoning.
        heartbeat: See `engines.api.LoadedModel`; it counts where a test lets it.
    """

    def __init__(self, slots: int, *, gated: bool = False, patience_s: float = 30) -> None:
        self.slots = slots
        self.patience_s = patience_s
        self.step_faults: deque[Exception | None] = deque()
        self.always: Exception | None = None
        self.not_numbers: set[str] = set()
        self.admit_faults: dict[str, Exception] = {}
        self.reset_faults: deque[Exception | None] = deque()
        self.running: dict[str, tuple[Sequence, int]] = {}
        self.admitted: list[str] = []
        self.stepped: list[tuple[str, ...]] = []
        self.cancelled: list[str] = []
        self.beside: list[Beside] = []
        self.thinks = 0
        self.heartbeat = 0
        self.resets = 0
        self.closes = 0
        self.gated = gated
        self.permits = threading.Semaphore(0)
        self.at_gate = threading.Semaphore(0)

    @property
    def free_slots(self) -> int:
        return self.slots - len(self.running)

    @property
    def busy(self) -> bool:
        return bool(self.running)

    @property
    def device_bytes(self) -> int:
        return 0

    @property
    def saved_bytes(self) -> int:
        return 0

    def admit(self, sequence: Sequence) -> None:
        assert not self.closes
        assert self.free_slots > 0, "admitted without a free slot"
        assert sequence.key not in self.running
        if (fault := self.admit_faults.pop(sequence.key, None)) is not None:
            raise fault
        self.running[sequence.key] = (sequence, 0)
        self.admitted.append(sequence.key)

    def step(self, beside: Beside = ALONE) -> list[StepEvent]:
        assert not self.closes
        assert self.running, "a step with nothing to do"
        self.beside.append(beside)
        if self.gated:
            self.at_gate.release()
            assert self.permits.acquire(timeout=self.patience_s)
        self.stepped.append(tuple(self.running))
        fault = self.step_faults.popleft() if self.step_faults else self.always
        if isinstance(fault, Hang):
            fault.began.set()
            assert fault.release.wait(30)
        elif fault is not None:
            raise fault
        return [self._advance(key) for key in list(self.running)]

    def _advance(self, key: str) -> StepEvent:
        sequence, made = self.running[key]
        if key in self.not_numbers:
            del self.running[key]
            return StepEvent(key, "", made - 1, made, FinishReason.ERROR)
        self.running[key] = (sequence, made + 1)
        finish = None
        if made + 1 == sequence.max_tokens:
            finish = FinishReason.LENGTH
            del self.running[key]
        text = f"<{sequence.tokens[0]}.{made}>"
        if sequence.reply is not None and made < self.thinks:
            return StepEvent(key, "", -1, made + 1, finish, reasoning=text, reasoning_index=made)
        return StepEvent(key, text, made, made + 1, finish)

    def cancel(self, key: str) -> bool:
        self.cancelled.append(key)
        return self.running.pop(key, None) is not None

    def reset(self) -> None:
        assert not self.closes
        self.resets += 1
        self.running.clear()
        if self.reset_faults and (fault := self.reset_faults.popleft()) is not None:
            raise fault

    def close(self) -> None:
        self.closes += 1
        self.running.clear()

    def allow(self, steps: int) -> None:
        """Let a gated model do so many more steps."""
        for _ in range(steps):
            self.permits.release()

    def await_gate(self) -> None:
        """Wait until its thread stands before its next step."""
        assert self.at_gate.acquire(timeout=30)


@dataclass
class FakeEngine:
    """Loads `FakeModel`s.

    Attributes:
        gated: Whether models wait for permits.
        load_faults: What the next loads raise; None for one that works.
        models: Every model ever loaded, in order.
        specs: What each load asked for.
        breaks: What every step of a model loaded from now on raises.
        patience_s: How long a model waits for a permit.
    """

    name: str = "llamacpp"
    version: str = "fake-1"
    gated: bool = False
    load_faults: deque[Exception | None] = field(default_factory=deque)
    models: list[FakeModel] = field(default_factory=list)
    vocabs: list[FakeVocab] = field(default_factory=list)
    specs: list[tuple[ModelSpec, DeviceSpec]] = field(default_factory=list)
    breaks: Exception | None = None
    patience_s: float = 30

    def vet(self, spec: ModelSpec, *, on_wait: WaitCallback | None = None) -> Footprint:
        if not spec.path.exists():
            raise LoadFailed(f"{spec.path.name} is not there")
        return Footprint(0, 0, 0)

    def load_vocab(self, path: Path) -> FakeVocab:
        self.vocabs.append(FakeVocab())
        return self.vocabs[-1]

    def load(self, spec: ModelSpec, device: DeviceSpec, *, on_progress: ProgressCallback | None = None) -> FakeModel:
        self.specs.append((spec, device))
        if self.load_faults and (fault := self.load_faults.popleft()) is not None:
            raise fault
        if on_progress is not None:
            on_progress(1.0)
        model = FakeModel(spec.slots, gated=self.gated, patience_s=self.patience_s)
        model.always = self.breaks
        self.models.append(model)
        return model
