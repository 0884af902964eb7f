"""What goes over the wire, as strict structs. The server decodes with them, the client too; no HTTP in here."""

from __future__ import annotations

import enum
import hashlib
import uuid
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from engines.api import FinishReason
from orchd.errors import Code

ENGINE = "llamacpp"


class Wire(msgspec.Struct, frozen=True, kw_only=True):
    """Base of what is sent; a reader ignores fields it does not know."""


class StrictWire(Wire, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of what is received; an unknown field is an error that names it."""


class Priority(str, enum.Enum):
    """The two priorities there are."""

    INTERACTIVE = "interactive"
    BATCH = "batch"


_CHARS_AROUND = 32
"""About what a chat template writes around each message."""


class Message(StrictWire, frozen=True, kw_only=True):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str


MAX_ARGUMENTS = 16
MAX_ARGUMENT_CHARS = 256

TemplateArgument = (
    bool | Annotated[int, Meta(ge=-(2**53), le=2**53)] | float | Annotated[str, Meta(max_length=MAX_ARGUMENT_CHARS)]
)
TemplateArguments = Annotated[
    dict[str, TemplateArgument],
    Meta(
        max_length=MAX_ARGUMENTS,
        extra={
            "expected": f"an object of up to {MAX_ARGUMENTS} values, each true, false, a number of at most 53 bits, or "
            f"a string of up to {MAX_ARGUMENT_CHARS} characters"
        },
    ),
]
"""Variables for the model's chat template, by name."""


class TaskRequest(StrictWire, frozen=True, kw_only=True):
    """Body of ``POST /v1/tasks``."""

    task_id: uuid.UUID | None = None
    pool_id: Annotated[str, Meta(max_length=64)] | None = None
    model_ref: Annotated[str, Meta(max_length=4096)] | None = None
    engine: Literal["llamacpp"] = "llamacpp"
    workload: Literal["completion"] = "completion"
    priority: Priority = Priority.INTERACTIVE
    prompt: Annotated[str, Meta(min_length=1)] | None = None
    messages: Annotated[tuple[Message, ...], Meta(min_length=1)] | None = None
    chat_template_kwargs: TemplateArguments | None = None
    reasoning: bool = False
    max_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] = 256
    stop: Annotated[tuple[Annotated[str, Meta(min_length=1, max_length=256)], ...], Meta(max_length=8)] = ()
    seed: Annotated[int, Meta(ge=0, le=2**32 - 1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=5)] = 0.8
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 40
    top_p: Annotated[float, Meta(gt=0, le=1)] = 0.95
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.05
    repeat_penalty: Annotated[float, Meta(gt=0, le=10)] = 1.0
    ignore_eos: bool = False

    def digest(self) -> bytes:
        """The same for the same request, however it was written."""
        return hashlib.blake2b(msgspec.msgpack.encode(self, order="deterministic"), digest_size=16).digest()

    def without_prompt(self) -> TaskRequest:
        """What is left of it once its task has started: what is small."""
        return msgspec.structs.replace(
            self,
            task_id=None,
            pool_id=None,
            model_ref=None,
            prompt=None,
            messages=None,
            chat_template_kwargs=None,
            stop=(),
        )

    @property
    def prompt_chars(self) -> int:
        """Characters of its prompt, or of all its messages and what is written around each."""
        if self.messages is None:
            return len(self.prompt or "")
        return sum(len(message.content) + _CHARS_AROUND for message in self.messages)


class Accepted(Wire, frozen=True, kw_only=True):
    """Body of a 202.

    Attributes:
        task_id: Names the task in every later request.
        queue_position: Tasks ahead of it in the pool's queue.
        predicted_start_ms: When it is expected to leave the queue, from now.
        backoff_ms: Pause a client should make before its next submit; 0 while the queue is under half full.
    """

    task_id: str
    queue_position: int
    predicted_start_ms: int
    backoff_ms: int


class ErrorBody(Wire, frozen=True, kw_only=True):
    """Every error body, and the ``error`` of an ``end`` event."""

    code: Code
    message: str
    engine: str = ENGINE


class Started(Wire, frozen=True, kw_only=True):
    """Data of the ``started`` event; repeats two figures of the 202."""

    queue_position: int
    predicted_start_ms: int


class Token(Wire, frozen=True, kw_only=True):
    """Data of a ``token`` event: whole UTF-8 text of the answer, and the index of the last token in it."""

    t: str
    i: int


class Reasoning(Wire, frozen=True, kw_only=True):
    """Data of a ``token`` event of what the model thinks before it answers; only for a task that asked for it."""

    r: str
    i: int


class End(Wire, frozen=True, kw_only=True, omit_defaults=True):
    """Data of the ``end`` event.

    Attributes:
        tokens_in: Prompt tokens.
        tokens_cached: Those of them that were found in a cache and not computed again.
        tokens_out: Output tokens, the end-of-generation token not counted.
        decode_ms: From the first output token to the end.
        finish_reason: Why it ended.
        error: What went wrong, where ``finish_reason`` is ``error``.
    """

    tokens_in: int
    tokens_cached: int
    tokens_out: int
    decode_ms: int
    finish_reason: FinishReason
    error: ErrorBody | None = None


class ReloadRequest(StrictWire, frozen=True, kw_only=True):
    """Body of ``POST /v1/pools/{id}/reload``."""

    new_model_ref: str | None = None


class Reloaded(Wire, frozen=True, kw_only=True):
    """Body of a reload's 200."""

    pool_id: str
    model_id: str


class ReplicaHealth(Wire, frozen=True, kw_only=True):
    """One replica in `Health`."""

    id: str
    device: str
    alive: bool
    slots: int
    busy: int


class PoolHealth(Wire, frozen=True, kw_only=True):
    """One pool in `Health`."""

    id: str
    model_id: str | None
    ctx: int
    ready: bool
    replicas: tuple[ReplicaHealth, ...]


class Health(Wire, frozen=True, kw_only=True):
    """Body of ``GET /health``."""

    status: Literal["ok", "loading", "degraded"]
    pools: tuple[PoolHealth, ...]
