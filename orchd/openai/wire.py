"""What OpenAI's clients send, as far as the bridge understands it.

At the top level of a request an unknown field is an error, so that a typo does not silently choose a default; what is
in `IGNORED` is accepted and changes nothing. Inside messages and tools unknown fields are left alone: clients send
back what other servers once added to them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from orchd.schemas import TemplateArguments
from orchd.settings.strict import Strict

IGNORED: Final = (
    "best_of",
    "frequency_penalty",
    "metadata",
    "modalities",
    "prediction",
    "presence_penalty",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "store",
    "user",
    "verbosity",
)
"""Fields that change nothing."""

REFUSED: Final = {
    "audio": "orchd generates text, no audio",
    "function_call": "deprecated by OpenAI and not available; use tool_choice",
    "functions": "deprecated by OpenAI and not available; use tools",
    "logit_bias": "not available; leave it out",
    "logprobs": "orchd does not return probabilities; leave it out",
    "moderation": "not available; leave it out",
    "suffix": "not available; write the model's own fill-in-the-middle tokens into prompt",
    "top_logprobs": "orchd does not return probabilities; leave it out",
    "web_search_options": "not available; leave it out, or offer a search of your own with tools",
}
"""Fields that ask for what orchd cannot do: an error, unless they are null, false, 0 or empty."""

FUNCTION_NAME = "1 to 64 letters, digits, underscores or hyphens"

if TYPE_CHECKING:

    class _ByName(Strict, frozen=True):
        pass

else:
    _ByName = msgspec.defstruct(
        "_ByName",
        [(name, Any, None) for name in (*IGNORED, *REFUSED)],
        bases=(Strict,),
        frozen=True,
        kw_only=True,
        forbid_unknown_fields=True,
    )


class _Inner(msgspec.Struct, frozen=True, kw_only=True):
    """Base of what is inside a request; unknown fields are left alone."""


class StreamOptions(_Inner, frozen=True):
    """What else a stream should tell."""

    include_usage: bool | None = None


class Part(_Inner, frozen=True):
    """A part of a message's content."""

    type: str
    text: str = ""


class CalledFunction(_Inner, frozen=True):
    """A function and the JSON text of its arguments."""

    name: str
    arguments: str = "{}"


class ToolCall(_Inner, frozen=True):
    """A call that the assistant made earlier in the conversation."""

    function: CalledFunction
    id: str = ""


class Message(_Inner, frozen=True):
    """One message of a conversation."""

    role: Literal["developer", "system", "user", "assistant", "tool"]
    content: str | tuple[Part, ...] | None = None
    tool_calls: tuple[ToolCall, ...] | None = None
    tool_call_id: str | None = None


class Function(_Inner, frozen=True):
    """A function that the model may call."""

    name: Annotated[str, Meta(pattern="^[A-Za-z0-9_-]{1,64}$", extra={"expected": FUNCTION_NAME})]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(_Inner, frozen=True):
    """A tool; there is one kind."""

    function: Function
    type: Literal["function"] = "function"


class FunctionName(_Inner, frozen=True):
    """Names a function."""

    name: str


class NamedTool(_Inner, frozen=True):
    """Names a tool."""

    function: FunctionName


class AllowedTools(_Inner, frozen=True):
    """Some of the tools."""

    tools: tuple[NamedTool, ...]
    mode: Literal["auto", "required"] = "auto"


class ToolChoice(_Inner, frozen=True):
    """The function to call, or those that may be called."""

    type: Literal["function", "allowed_tools"]
    function: FunctionName | None = None
    allowed_tools: AllowedTools | None = None


class NamedSchema(_Inner, frozen=True):
    """A JSON Schema under a name."""

    schema: dict[str, Any] | None = None


class ResponseFormat(_Inner, frozen=True):
    """What the answer's text must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None


class _Request(_ByName, frozen=True):
    """What both kinds of completion have in common."""

    model: str
    max_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    n: Annotated[int, Meta(ge=1, le=16)] | None = None
    stop: str | Annotated[tuple[str, ...], Meta(max_length=8)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    service_tier: str | None = None
    temperature: Annotated[float, Meta(ge=0, le=5)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    # orchd's own, for clients that let a user add fields
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repeat_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None


class ChatRequest(_Request, frozen=True, kw_only=True):
    """Body of ``POST /v1/chat/completions``."""

    messages: Annotated[tuple[Message, ...], Meta(min_length=1)]
    max_completion_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[tuple[Tool, ...], Meta(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    chat_template_kwargs: TemplateArguments | None = None


class CompletionRequest(_Request, frozen=True, kw_only=True):
    """Body of ``POST /v1/completions``."""

    prompt: str | Annotated[tuple[str, ...], Meta(min_length=1, max_length=16)]
    echo: bool | None = None


Request = ChatRequest | CompletionRequest
