"""Errors in OpenAI's shape: those of the bridge, and what `orchd.client` raises."""

from __future__ import annotations

import re
from typing import Final

import msgspec
from aiohttp import web

from orchd.client import (
    ClientError,
    Forbidden,
    Refused,
    TaskFailed,
    Unauthorized,
)
from orchd.errors import UNREADY_RETRY_S, Code, TaskError
from orchd.http.errors import MAX_MESSAGE_CHARS, STATUS
from orchd.openai.answers import Error, ErrorDetail

_KINDS: Final = {
    Code.INVALID_PARAMS: ("invalid_request_error", None),
    Code.UNAUTHORIZED: ("invalid_request_error", "invalid_api_key"),
    Code.FORBIDDEN: ("invalid_request_error", "forbidden"),
    Code.NOT_FOUND: ("invalid_request_error", "not_found"),
    Code.METHOD_NOT_ALLOWED: ("invalid_request_error", "method_not_allowed"),
    Code.ADMISSION_REJECT: ("rate_limit_error", "rate_limit_exceeded"),
}
"""OpenAI's type and code of each of ours; of all others, those of a server's error."""

_PARAM = re.compile(r"(?:unknown field )?([a-z_][a-z0-9_.\[\]]*)(?:: |; | is required)", re.IGNORECASE)

DOES_NOT_FIT: Final = "slot's context"
"""In the server's sentence about a prompt that does not fit, together with its output."""


def detail(code: Code, message: str) -> ErrorDetail:
    """An error's description. The field is the one that its sentence begins with."""
    message = _in_their_words(message)
    if len(message) > MAX_MESSAGE_CHARS:
        message = f"{message[: MAX_MESSAGE_CHARS - 3]}..."
    kind, name = _KINDS.get(code, ("server_error", code.value.lower()))
    param = found[1] if kind == "invalid_request_error" and (found := _PARAM.match(message)) else None
    if code is Code.NOT_FOUND and param == "model":
        name = "model_not_found"
    elif code is Code.INVALID_PARAMS and DOES_NOT_FIT in message:
        name = "context_length_exceeded"
    return ErrorDetail(message=message, type=kind, param=param, code=name)


def _in_their_words(message: str) -> str:
    """The server speaks of a task's ``json_schema``; here a function's parameters or a response format became it."""
    message = message.replace("json_schema: #/$defs/call_", "tools: #/", 1)
    return message.replace("json_schema: ", "response_format: ", 1) if message.startswith("json_schema: ") else message


def envelope(code: Code, message: str, headers: dict[str, str]) -> web.Response:
    """The error body of every route. OpenAI's SDKs wait for as long as ``retry-after-ms`` says."""
    if backoff_ms := headers.pop("X-Backoff-Ms", None):
        headers = headers | {"retry-after-ms": backoff_ms}
    return web.Response(
        status=STATUS[code],
        body=msgspec.json.encode(Error(error=detail(code, message))),
        content_type="application/json",
        headers=headers,
    )


class FromServer(TaskError):
    """What the server, or the way to it, made of a request.

    Args:
        error: As `orchd.client` raised it.
    """

    def __init__(self, error: ClientError) -> None:
        message, retry_after_s = str(error), None
        if isinstance(error, (Unauthorized, Forbidden)):
            self.code = Code.POOL_UNAVAILABLE
            message = f"the server refuses this bridge ({message}); restart orchd openai with the server's settings"
        elif isinstance(error, Refused):
            self.code, retry_after_s = error.code, error.pause_s
        elif isinstance(error, TaskFailed):
            self.code = error.code or Code.POOL_UNREADY
        else:  # nothing answers, or something else does
            self.code, retry_after_s = Code.POOL_UNAVAILABLE, UNREADY_RETRY_S
        super().__init__(message, retry_after_s=retry_after_s)


def event(error: TaskError) -> bytes:
    """The last event of a stream that fails."""
    return b"data: %b\n\n" % msgspec.json.encode(Error(error=detail(error.code, str(error))))
