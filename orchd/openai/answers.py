"""What OpenAI's clients receive: completions whole and in chunks, usage, models, errors."""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

Finish = Literal["stop", "length", "tool_calls"]


class _Answer(msgspec.Struct, frozen=True, kw_only=True):
    """Base of what is sent. What is UNSET is left out, what is None is null."""


class FunctionDelta(_Answer, frozen=True):
    """A function's name, or more of its arguments' JSON text."""

    arguments: str
    name: str | UnsetType = UNSET


class ToolCallDelta(_Answer, frozen=True):
    """The beginning of a call, which has an id, or more of it."""

    index: int
    function: FunctionDelta
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET


class Delta(_Answer, frozen=True):
    """More of a choice."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: tuple[ToolCallDelta, ...] | UnsetType = UNSET


class PromptDetails(_Answer, frozen=True):
    """Of the prompt's tokens, those that were not computed again."""

    cached_tokens: int


class CompletionDetails(_Answer, frozen=True):
    """Of the output's tokens, those that the model thought."""

    reasoning_tokens: int


class Usage(_Answer, frozen=True):
    """Tokens of a request: its prompts, each once, and all its choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class ChunkChoice(_Answer, frozen=True):
    """A choice in a `ChatChunk`."""

    index: int
    delta: Delta
    logprobs: None = None
    finish_reason: Finish | None = None


class ChatChunk(_Answer, frozen=True):
    """A piece of a streamed chat completion."""

    id: str
    created: int
    model: str
    choices: tuple[ChunkChoice, ...]
    usage: Usage | UnsetType | None = UNSET
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"


class Called(_Answer, frozen=True):
    """A function and the JSON text of its arguments."""

    name: str
    arguments: str


class Call(_Answer, frozen=True):
    """A call that the model makes."""

    id: str
    function: Called
    type: Literal["function"] = "function"


class AssistantMessage(_Answer, frozen=True):
    """What the model wrote."""

    content: str | None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: tuple[Call, ...] | UnsetType = UNSET
    refusal: None = None
    role: Literal["assistant"] = "assistant"


class ChatChoice(_Answer, frozen=True):
    """A choice in a `ChatCompletion`."""

    index: int
    message: AssistantMessage
    finish_reason: Finish
    logprobs: None = None


class ChatCompletion(_Answer, frozen=True):
    """Body of a chat completion that is not streamed."""

    id: str
    created: int
    model: str
    choices: tuple[ChatChoice, ...]
    usage: Usage
    object: Literal["chat.completion"] = "chat.completion"


class TextChoice(_Answer, frozen=True):
    """A choice in a `TextCompletion`."""

    index: int
    text: str
    finish_reason: Finish | None = None
    logprobs: None = None


class TextCompletion(_Answer, frozen=True):
    """Body of a completion, or a piece of one that is streamed."""

    id: str
    created: int
    model: str
    choices: tuple[TextChoice, ...]
    usage: Usage | UnsetType | None = UNSET
    object: Literal["text_completion"] = "text_completion"


class Model(_Answer, frozen=True):
    """A name that requests may use."""

    id: str
    created: int
    owned_by: str = "orchd"
    object: Literal["model"] = "model"


class ModelList(_Answer, frozen=True):
    """Body of ``GET /v1/models``."""

    data: tuple[Model, ...]
    object: Literal["list"] = "list"


class ErrorDetail(_Answer, frozen=True):
    """What went wrong.

    Attributes:
        message: One sentence that says what would be right.
        type: The kind of error, such as ``invalid_request_error``.
        param: The field that is wrong.
        code: For programs, such as ``rate_limit_exceeded``.
    """

    message: str
    type: str
    param: str | None
    code: str | None


class Error(_Answer, frozen=True):
    """Every error body, and an event in a stream that fails."""

    error: ErrorDetail
