"""Connections on which every answer is ours, also to what no route and no middleware gets to see."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator
from typing import Any

from aiohttp import web
from aiohttp.http import HttpProcessingError

from orchd.errors import Code
from orchd.http import errors
from orchd.http.errors import Envelope

_log = logging.getLogger(__name__)

BACKLOG = 1024
COMPLAINT_S = 60.0

IDLE_S = 75.0
"""How long a connection may take to send the head of its next request, from when it was opened or last answered. Above
the 60 s for which reverse proxies like to keep theirs."""

LINGER_S = 5.0
"""How long the rest of a body that was refused is still read, so that its sender gets to see the answer."""

SHUTDOWN_S = 2.0


@contextlib.asynccontextmanager
async def serving(
    app: web.Application,
    listening: socket.socket,
    *,
    envelope: Envelope = errors.envelope,
    shutdown_s: float = SHUTDOWN_S,
) -> AsyncIterator[None]:
    """Serve an application on a bound socket for the duration of the context. There is no access log.

    Args:
        app: The application.
        listening: Where to listen.
        envelope: The shape of its errors.
        shutdown_s: How long requests that are being answered have at the end.
    """
    loop = asyncio.get_running_loop()
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=shutdown_s)
    await runner.setup()
    manager = runner.server
    assert manager is not None  # `setup` made it
    loop.set_exception_handler(_Complaints())
    # One accept at a time: where descriptors have run out, each that fails makes a timer to try again, and in a batch
    # their number doubles every second.
    server = await loop.create_server(
        lambda: Connection(manager, loop=loop, envelope=envelope), sock=listening, backlog=1
    )
    listening.listen(BACKLOG)  # the kernel's queue may be long all the same
    try:
        yield
    finally:
        server.close()
        await runner.cleanup()
        loop.set_exception_handler(None)


class _Complaints:
    """What an event loop says where nobody catches it, but a connection that cannot be taken only once a minute."""

    def __init__(self) -> None:
        self._next_s = 0.0

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not (isinstance(error, OSError) and "accept() out of system resource" in context["message"]):
            loop.default_exception_handler(context)
        elif loop.time() >= self._next_s:
            self._next_s = loop.time() + COMPLAINT_S
            _log.error("cannot accept more connections (%s); allow more open files with: ulimit -n", error.strerror)


class Connection(web.RequestHandler):
    """One client's connection.

    aiohttp answers bytes that are not HTTP, and an ``Expect`` it does not know, by itself: in plain text, and with a
    log line that quotes the request, token and all. It would also decompress every body as it arrives, whoever sends it
    and whatever becomes of it: a megabyte of zeros, a thousandfold, on the event loop.
    """

    def __init__(
        self, manager: web.Server, *, loop: asyncio.AbstractEventLoop, envelope: Envelope = errors.envelope
    ) -> None:
        super().__init__(
            manager,
            loop=loop,
            access_log=None,  # type: ignore[arg-type]  # None is how to have none
            keepalive_timeout=IDLE_S,
            lingering_time=LINGER_S,
            auto_decompress=False,
        )
        self._envelope = envelope

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to what is not HTTP, and to a defect that no middleware saw."""
        if request.writer.output_size > 0:
            raise ConnectionError("an answer has already begun; the connection can only be closed")
        if isinstance(exc, HttpProcessingError):
            _log.debug("a request was refused: %s", type(exc).__name__)
            sentence = (
                f"the request is not valid HTTP/1.1, or a line of its head exceeds {self.max_line_size} bytes; "
                "send a well-formed request with shorter lines"
            )
            response = self._envelope(Code.INVALID_PARAMS, sentence, {})
        else:
            response = errors.internal(exc, request, self._envelope)
        response.force_close()
        return response

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Sends an answer; one that aiohttp made becomes ours."""
        if isinstance(resp, web.HTTPException):
            resp = errors.from_http_error(resp, request, self._envelope)
        return await super().finish_response(request, resp, start_time)
