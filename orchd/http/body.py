"""A request's body: whole, in time, and no larger than allowed."""

from __future__ import annotations

import asyncio
import sys

from aiohttp import hdrs, web

from orchd.errors import InvalidParams

if sys.version_info >= (3, 11):
    from asyncio import timeout
else:
    from async_timeout import timeout

BODY_S = 60.0
"""How long a body may take to arrive, from its head on."""


async def read_body(request: web.Request) -> bytes:
    """All of a request's body.

    Raises:
        InvalidParams: It is compressed, too large, malformed, or does not arrive.
    """
    if hdrs.CONTENT_ENCODING in request.headers:
        named = ",".join(request.headers.getall(hdrs.CONTENT_ENCODING))
        if not {name.strip().lower() for name in named.split(",")} <= {"", "identity"}:
            raise InvalidParams("the body is compressed; send it without Content-Encoding")
    limit = request.client_max_size
    try:
        if request.content.is_eof():  # all of it has arrived, as is usual: neither a timer nor a copy
            body = request.content.read_nowait()
        else:
            async with timeout(BODY_S):
                body = await request.read()
    except asyncio.TimeoutError:
        raise InvalidParams(f"the body did not arrive within {BODY_S:g} s; send it without pauses") from None
    except web.HTTPRequestEntityTooLarge:
        raise _too_large(limit) from None
    except web.RequestPayloadError:
        raise InvalidParams("the body's chunks are malformed; send it with Content-Length") from None
    if len(body) > limit:
        raise _too_large(limit)
    return body


def _too_large(limit: int) -> InvalidParams:
    return InvalidParams(f"the body is larger than {limit} bytes (server.max_body_bytes); send a smaller one")
