"""The seam between orchd and an engine: what a model is asked to do, in plain values.

A program that uses an engine holds three things: an `Engine` (stateless, loads), a `Vocab` (text to tokens, any thread)
and one `LoadedModel` per device (tokens to text, one thread at a time).
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, Protocol

ProgressCallback = Callable[[float], None]
"""Called with the share of the work done, 0.0 to 1.0, on the thread that does it. What it raises ends the work."""

WaitCallback = Callable[[], None]
"""Called a few times a second from a thread that waits. What it raises ends the wait, and what is waited for."""


TemplateArgument = bool | int | float | str
"""A variable that a task may give to its model's chat template."""

NO_ARGUMENTS: Final[Mapping[str, TemplateArgument]] = {}

Schema = Mapping[str, Any] | Literal[True]
"""A JSON Schema; True stands for that of any object."""


class Grammar(Protocol):
    """A schema that was compiled by a `Vocab`, for sequences on models with that vocabulary. Serves any number."""


class FinishReason(str, enum.Enum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True)
class DeviceSpec:
    """One device as the engine addresses it.

    Attributes:
        kind: What it is.
        ordinal: Index among the GPUs this process can see, in the order of ``CUDA_VISIBLE_DEVICES``; 0 for a CPU.
        threads: Compute threads on the host. For a GPU they only run what llama.cpp leaves on the host.
        cpus: CPUs to keep the compute threads on, one each, the thread that steps included; empty lets them move.
        pci: A GPU's PCI address, such as ``0000:01:00.0``: Vulkan counts GPUs in an order of its own. Empty if unknown.
    """

    kind: Literal["cpu", "gpu"]
    ordinal: int = 0
    threads: int = 1
    cpus: tuple[int, ...] = ()
    pci: str = ""


@dataclass(frozen=True)
class ModelSpec:
    """A model file and the shape in which it is to be held.

    Attributes:
        path: The GGUF file; of a split model, its first part.
        slots: Sequences that can run at the same time.
        ctx: Tokens per slot, prompt and output together.
        batch: Most tokens one step may process.
        flash_attn: Flash attention; ``auto`` leaves it to llama.cpp.
        cache_type_k: Data type of the K cache (llama.cpp's names: ``f16``, ``q8_0``, ...).
        cache_type_v: Data type of the V cache.
        swa_full: Keep all of a sliding-window layer's cache, so that any prefix can be used again. Off, it takes less
            memory, and only what continues an earlier prompt is.
        mmap: Map the file instead of reading it into memory.
        speculate: Check several guessed tokens of a stream in one step, where that makes it faster.
        deterministic: The same sequence gives the same text, whatever else runs or ran before: one sequence a step, and
            nothing is guessed or reused.
        prompt_cache_mib: Host memory for prompts that have left their slot, in MiB; 0 keeps none.
        step_target_s: How long a step should take, at most, while a sequence is streaming.
        lone_step_s: How long it should take, at most, while none is: what comes or is cancelled waits for its end.
    """

    path: Path
    slots: int = 4
    ctx: int = 4096
    batch: int = 512
    flash_attn: Literal["auto", "on", "off"] = "auto"
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    swa_full: bool = False
    mmap: bool = True
    speculate: bool = True
    deterministic: bool = False
    prompt_cache_mib: int = 1024
    step_target_s: float = 0.12
    lone_step_s: float = 0.5


@dataclass(frozen=True)
class Footprint:
    """Bytes that a model needs in the shape of a `ModelSpec`.

    Attributes:
        weights: Size of its file.
        cache: KV cache, or recurrent state, of all slots.
        buffers: Compute and output buffers.
        on_gpu: Besides, on a GPU: copies of a cache that is not of half floats, or what no flash attention takes.
    """

    weights: int
    cache: int
    buffers: int
    on_gpu: int = 0

    @property
    def total(self) -> int:
        """All that it needs anywhere."""
        return self.weights + self.cache + self.buffers


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. Ranges are checked by the caller.

    Attributes:
        temperature: 0 is greedy.
        top_k: Keep the k most likely tokens; 0 keeps all.
        top_p: Keep the smallest set with this probability; 1 keeps all.
        min_p: Drop tokens below this share of the most likely one's probability; 0 keeps all.
        repeat_penalty: Divides the logits of the last 64 tokens; 1 is off.
        seed: 32 bits; the same seed, prompt and slot layout give the same text.
        ignore_eos: Never choose an end-of-generation token.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    seed: int = 0
    ignore_eos: bool = False


@dataclass(frozen=True)
class Prompt:
    """What a model reads.

    Attributes:
        tokens: All of it.
        reply: What it already holds of the reply to a conversation: the template's markup, the beginning of an answer,
            or nothing. None where it is no conversation: then the output is not told apart into reasoning and answer.
    """

    tokens: Seq[int]
    reply: str | None = None


@dataclass(frozen=True)
class Sequence:
    """One prompt to be continued.

    Attributes:
        key: The caller's name for it; unique among the sequences running on a model.
        tokens: The prompt; at least one token.
        max_tokens: Output tokens, at least 1; ``len(tokens) + max_tokens <= ModelSpec.ctx``.
        stop: The answer ends before the first of these strings, whether the model's tokens for it are shown or not.
        reply: `Prompt.reply`.
        sampling: How tokens are chosen.
        urgent: Its prompt is prefilled before those of sequences that are not.
        grammar: What the output has to be; it ends there. With `SamplingParams.ignore_eos`, not before it has to.
    """

    key: str
    tokens: Seq[int]
    max_tokens: int
    stop: tuple[str, ...] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    urgent: bool = True
    reply: str | None = None
    grammar: Grammar | None = None


@dataclass(frozen=True)
class StepEvent:
    """What one step did for one sequence: text that is ready, its end, or both.

    Attributes:
        key: `Sequence.key`.
        text: Whole UTF-8 text of the answer, possibly empty: half a character and the beginning of a stop string or of
            a marker are held back.
        index: Index of the last output token that ``text`` holds.
        tokens_out: Output tokens so far, the end-of-generation token not counted.
        finish: Set on the last event of a sequence; `FinishReason.ERROR` where the model computed no number for it.
        tokens_read: Prompt tokens processed so far; a prompt that takes several steps gets an event in each.
        tokens_cached: Those of them that were not computed again.
        reasoning: The same of what the model thinks; it comes before ``text``.
        reasoning_index: Index of the last output token that ``reasoning`` holds.
    """

    key: str
    text: str
    index: int
    tokens_out: int
    finish: FinishReason | None = None
    tokens_read: int = 0
    tokens_cached: int = 0
    reasoning: str = ""
    reasoning_index: int = -1
    problem: str = ""


@dataclass(frozen=True)
class Beside:
    """What other models on the same device do between two steps of one.

    Attributes:
        streams: Sequences that are streaming there.
        streams_s: Seconds that a step of theirs takes, of all these models together; 0 where none was measured.
        prompts: Models there that prefill too, and get as much of the time as this one.
    """

    streams: int = 0
    streams_s: float = 0.0
    prompts: int = 0


ALONE: Final = Beside()


class Vocab(Protocol):
    """A model's tokenizer and chat template. Every method may be called from any thread, `close` from the last one."""

    def tokenize(self, prompt: str, *, at_most: int | None = None) -> list[int]:
        """Tokens of a raw prompt; special tokens written in it are special.

        Raises `InvalidPrompt`, and `PromptTooLong` if there are more than ``at_most``.
        """

    def tokenize_chat(
        self,
        messages: Seq[Mapping[str, str]],
        *,
        arguments: Mapping[str, TemplateArgument] = NO_ARGUMENTS,
        at_most: int | None = None,
    ) -> Prompt:
        """A conversation (``role``, ``content``) as the model's template writes it, ready for the reply.

        Where the last message is the assistant's, ready for more of it. No text in a message, and none in an argument
        for the template, becomes a control token. Raises as `tokenize` does.
        """

    def grammar(self, schema: Schema) -> Grammar:
        """Compile a schema; the first time takes a second more. Raises `InvalidSchema`, which names the place."""

    def opens_thinking(self, tokens: Seq[int]) -> bool:
        """Whether a prompt ends inside of what the model only thinks."""

    def close(self) -> None:
        """Free the tokenizer. Calling it again does nothing."""


class LoadedModel(Protocol):
    """One model in one device's memory, with its slots. One thread at a time; loading may happen on another."""

    @property
    def free_slots(self) -> int:
        """Slots that can take a sequence now."""

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""

    @property
    def device_bytes(self) -> int:
        """Bytes of device memory held: weights, KV cache and compute buffers."""

    @property
    def saved_bytes(self) -> int:
        """Bytes of host memory that prompts take which have left their slot; any thread."""

    def admit(self, sequence: Sequence) -> None:
        """Give a sequence a slot. The caller has checked `free_slots`."""

    @property
    def heartbeat(self) -> int:
        """Another number each time it is read while a step computes, where the device tells; any thread."""

    def step(self, beside: Beside = ALONE) -> list[StepEvent]:
        """One forward pass over every running sequence; at most one event for each. Raises `DecodeFailed`.

        A sequence for which the model computes NaN or infinity ends alone, and its slot is free.

        Prompts get as much of it as `ModelSpec.step_target_s` leaves, or `ModelSpec.lone_step_s` where nothing streams.
        """

    def cancel(self, key: str) -> bool:
        """Free the slot of a sequence; no further event will carry its key. False if none has it."""

    def reset(self) -> None:
        """Drop every sequence and all cached state, after `DecodeFailed`. Raises `EngineDead`."""

    def close(self) -> None:
        """Free everything. Calling it again does nothing."""


class Engine(Protocol):
    """Loads models. ``name`` and ``version`` appear in metrics."""

    name: str
    version: str

    def vet(self, spec: ModelSpec, *, on_wait: WaitCallback | None = None) -> Footprint:
        """Open a file where it can do no harm; what it needs in memory. Raises `LoadFailed`."""

    def load_vocab(self, path: Path) -> Vocab:
        """Open only the tokenizer of a model file. Raises `LoadFailed`."""

    def load(self, spec: ModelSpec, device: DeviceSpec, *, on_progress: ProgressCallback | None = None) -> LoadedModel:
        """Load a model on one device, entirely. Raises `LoadFailed`, `OutOfDeviceMemory`."""
