"""From what OpenAI's clients ask for to the tasks that answer it, one for each choice. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from orchd.client import TaskOptions
from orchd.errors import InvalidParams
from orchd.openai.conversation import Turn, conversation
from orchd.openai.decision import DecisionReader, PlainReader, Reader
from orchd.openai.models import Target
from orchd.openai.tools import plan
from orchd.openai.wire import REFUSED, ChatRequest, CompletionRequest, Request

COMPLETION_TOKENS: Final = 16
"""What a completion without ``max_tokens`` gets, as at OpenAI."""

TEMPLATE_TOKENS: Final = 256
"""For what a chat template writes by itself."""

LEAST_TOKENS: Final = 16
"""With less room for an answer, a prompt counts as too long."""

_SEEDS: Final = 2**32
_LEAST_TOP_P: Final = 1e-6

_EFFORTS: Final[dict[str, dict[str, bool | str]]] = {
    "none": {"enable_thinking": False},
    "minimal": {"enable_thinking": False},
    "low": {"reasoning_effort": "low"},
    "medium": {"reasoning_effort": "medium"},
    "high": {"reasoning_effort": "high"},
    "xhigh": {"reasoning_effort": "high"},
}
"""What chat templates understand of ``reasoning_effort``; those that do not know these variables ignore them."""


@dataclass(frozen=True)
class Job:
    """A task to be, and how to read what it writes.

    Attributes:
        index: Of the choice.
        prompt_number: Which of the request's prompts it answers.
        options: Of the task, without ``max_tokens``.
        budgets: Values of ``max_tokens`` to try, until one fits into a slot together with the prompt.
        reader: For its text.
        prompt: Raw text, or
        messages: a conversation.
        echo: What its text begins with.
    """

    index: int
    prompt_number: int
    options: TaskOptions
    budgets: tuple[int, ...]
    reader: Reader
    prompt: str | None = None
    messages: list[Turn] | None = None
    echo: str = ""


def chat_jobs(request: ChatRequest, target: Target) -> list[Job]:
    """The tasks of a chat completion.

    Raises:
        InvalidParams: The request asks for what is not available.
    """
    _check(request)
    schema = _schema(request)
    tools = plan(request, reply={"type": "string"} if schema is None else schema)
    turns = conversation(request.messages, instructions=None if tools is None else tools.instructions())
    options = _options(request, target)
    options["reasoning"] = True
    options["json_schema"] = _for_server(schema) if tools is None else tools.schema()
    arguments = {**_EFFORTS.get(request.reasoning_effort or "", {}), **(request.chat_template_kwargs or {})}
    options["chat_template_kwargs"] = arguments or None
    most = request.max_completion_tokens or request.max_tokens
    prompt_bytes = sum(len(turn["content"].encode()) for turn in turns)
    budgets = output_budgets(target.ctx, prompt_bytes) if most is None else (most,)
    stop = options["stop"] or ()
    if tools is not None:
        options["stop"] = None  # the reader looks for it
    return [
        Job(
            index,
            0,
            _seeded(options, request.seed, index),
            budgets,
            PlainReader() if tools is None else DecisionReader(stop),
            messages=turns,
        )
        for index in range(request.n or 1)
    ]


def completion_jobs(request: CompletionRequest, target: Target) -> list[Job]:
    """The tasks of a completion: ``n`` for each of its prompts.

    Raises:
        InvalidParams: The request asks for what is not available.
    """
    _check(request)
    options = _options(request, target)
    prompts = (request.prompt,) if isinstance(request.prompt, str) else request.prompt
    n = request.n or 1
    return [
        Job(
            number * n + again,
            number,
            _seeded(options, request.seed, again),
            (request.max_tokens or COMPLETION_TOKENS,),
            PlainReader(),
            prompt=prompt,
            echo=prompt if request.echo else "",
        )
        for number, prompt in enumerate(prompts)
        for again in range(n)
    ]


def output_budgets(ctx: int, prompt_bytes: int) -> tuple[int, ...]:
    """Values of ``max_tokens`` for a request that has none, each smaller than the one before it.

    Clients expect an answer to be as long as the context allows. How long a prompt is in tokens only the server knows,
    but a token stands for a byte at least, so the first value fits for most prompts.

    Args:
        ctx: Tokens of a slot.
        prompt_bytes: Of the prompt in UTF-8.
    """
    most = max(ctx - prompt_bytes - TEMPLATE_TOKENS, ctx // 2, 1)
    budgets = [most]
    while (most := most // 2) >= LEAST_TOKENS:
        budgets.append(most)
    return tuple(budgets)


def _check(request: Request) -> None:
    for name, why in REFUSED.items():
        if getattr(request, name):
            raise InvalidParams(f"{name}: {why}")


def _schema(request: ChatRequest) -> dict[str, Any] | None:
    """Of the reply; None for text."""
    wanted = request.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return {"type": "object"}
    if wanted.json_schema is None or wanted.json_schema.schema is None:
        raise InvalidParams("response_format: json_schema.schema is required for this type")
    return wanted.json_schema.schema


def _for_server(schema: dict[str, Any] | None) -> dict[str, Any] | bool | None:
    return True if schema == {"type": "object"} else schema


def _options(request: Request, target: Target) -> TaskOptions:
    return {
        "pool_id": target.pool_id,
        "model_ref": target.model_ref,
        "priority": "batch" if request.service_tier == "flex" else None,
        "stop": _stop(request),
        "temperature": request.temperature,
        "top_k": request.top_k,
        "top_p": None if request.top_p is None else max(request.top_p, _LEAST_TOP_P),
        "min_p": request.min_p,
        "repeat_penalty": request.repeat_penalty,
    }


def _stop(request: Request) -> list[str] | None:
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or ()
    return [text for text in stop if text] or None


def _seeded(options: TaskOptions, seed: int | None, again: int) -> TaskOptions:
    """The options of one of several choices: with the same seed they would all be the same."""
    return options if seed is None else {**options, "seed": (seed + again) % _SEEDS}
