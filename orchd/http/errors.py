"""Error envelopes: the status and headers of every `orchd.errors.Code`."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import msgspec
from aiohttp import hdrs, web

from orchd.errors import Code, TaskError
from orchd.schemas import ErrorBody

_log = logging.getLogger(__name__)

MAX_MESSAGE_CHARS = 500

STATUS: dict[Code, int] = {
    Code.INVALID_PARAMS: 400,
    Code.UNAUTHORIZED: 401,
    Code.FORBIDDEN: 403,
    Code.NOT_FOUND: 404,
    Code.METHOD_NOT_ALLOWED: 405,
    Code.RELOAD_IN_PROGRESS: 409,
    Code.RELOAD_FAILED: 422,
    Code.ADMISSION_REJECT: 429,
    Code.INTERNAL: 500,
    Code.POOL_UNREADY: 503,
    Code.POOL_UNAVAILABLE: 503,
    Code.DECODE_TIMEOUT: 500,
    Code.WORKER_RESET: 500,
}


Envelope = Callable[[Code, str, dict[str, str]], web.Response]
"""Makes an error body with these headers; another program may have bodies of another shape."""


def envelope(code: Code, message: str, headers: dict[str, str] | None = None) -> web.Response:
    """The error body that every route uses, exactly ``{code, message, engine}``. A message may not quote at length."""
    if len(message) > MAX_MESSAGE_CHARS:
        message = f"{message[: MAX_MESSAGE_CHARS - 3]}..."
    return web.Response(
        status=STATUS[code],
        body=msgspec.json.encode(ErrorBody(code=code, message=message)),
        content_type="application/json",
        headers=headers,
    )


def from_task_error(error: TaskError, envelope: Envelope = envelope) -> web.Response:
    """A refusal, with how long to wait where trying again may help."""
    headers: dict[str, str] = {}
    if error.retry_after_s is not None:
        headers[hdrs.RETRY_AFTER] = str(max(1, math.ceil(error.retry_after_s)))
        if error.code is Code.ADMISSION_REJECT:
            headers["X-Backoff-Ms"] = str(max(1, math.ceil(error.retry_after_s * 1000)))
    return envelope(error.code, str(error), headers)


def from_http_error(error: web.HTTPException, request: web.BaseRequest, envelope: Envelope = envelope) -> web.Response:
    """What aiohttp itself refuses, in our words."""
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        message = f"{request.method} is not allowed on {request.path}; use {allowed}"
        return envelope(Code.METHOD_NOT_ALLOWED, message, {hdrs.ALLOW: allowed})
    if isinstance(error, web.HTTPNotFound):
        return envelope(Code.NOT_FOUND, f"there is no route {request.path}", {})
    if 400 <= error.status < 500:
        return envelope(Code.INVALID_PARAMS, f"the request is malformed ({error.reason})", {})
    return internal(error, request, envelope)


def internal(error: BaseException | None, request: web.BaseRequest, envelope: Envelope = envelope) -> web.Response:
    """A defect: the log has the details, the client gets a sentence."""
    _log.error("%s %s failed", request.method, request.path, exc_info=error)
    return envelope(Code.INTERNAL, "orchd failed to handle this request; see the server's log", {})
