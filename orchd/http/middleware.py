"""What requests pass on their way to a route (Host, origin, token), and what answers get on their way back."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import hdrs, web
from aiohttp.typedefs import Middleware

from orchd.errors import Code, TaskError
from orchd.http import errors
from orchd.http.auth import Gate
from orchd.http.errors import Envelope

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def gatekeeper(
    gate: Gate,
    *,
    preflight: Callable[[web.Request], dict[str, str]],
    envelope: Envelope = errors.envelope,
    token_in_query: Callable[[web.Request], bool] = lambda request: False,
) -> Middleware:
    """Lets in only requests to a name of this machine, from a page that may ask, with the token.

    Args:
        gate: Decides.
        preflight: Headers of the answer to a browser that asks before it sends.
        envelope: The shape of refusals.
        token_in_query: Whether ``?access_token=`` counts too.
    """

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not gate.knows_host(request):
            message = "this Host is not allowed; use 127.0.0.1, or add the host to server.allowed_hosts"
            return envelope(Code.FORBIDDEN, message, {})
        origin = request.headers.get(hdrs.ORIGIN)
        if origin is not None and not gate.knows_origin(origin):
            message = "pages from this Origin are not allowed; add the origin to server.allowed_origins"
            return envelope(Code.FORBIDDEN, message, {})
        if origin is not None and request.method == "OPTIONS" and hdrs.ACCESS_CONTROL_REQUEST_METHOD in request.headers:
            return web.Response(status=204, headers=preflight(request))
        in_query = token_in_query(request)
        if not gate.knows_token(request, query_too=in_query):
            sent = hdrs.AUTHORIZATION in request.headers or (in_query and "access_token" in request.query)
            remedy = "send it as Authorization: Bearer TOKEN"
            message = (
                f"the token is wrong; read the server's, and {remedy}" if sent else f"the token is missing; {remedy}"
            )
            return envelope(Code.UNAUTHORIZED, message, {hdrs.WWW_AUTHENTICATE: 'Bearer realm="orchd"'})
        return await handler(request)

    return check


def enveloper(envelope: Envelope = errors.envelope) -> Middleware:
    """Turns what a route raises into an error body."""

    @web.middleware
    async def answer(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except TaskError as error:
            return errors.from_task_error(error, envelope)
        except web.HTTPException as error:
            return errors.from_http_error(error, request, envelope)
        except ConnectionError:
            raise  # the client has disconnected: there is no one to answer
        except Exception as error:
            internal = errors.internal(error, request, envelope)
            if request.writer.output_size > 0:
                sentence = "a stream failed after it had begun; the connection can only be closed"
                raise ConnectionError(sentence) from error
            return internal

    return answer


def allow_origin(gate: Gate, *, exposed: str) -> Callable[[web.Request, web.StreamResponse], Awaitable[None]]:
    """For ``on_response_prepare``: lets a page of an allowed origin read the answer and the ``exposed`` headers."""

    async def add(request: web.Request, response: web.StreamResponse) -> None:
        origin = request.headers.get(hdrs.ORIGIN)
        if origin is not None and gate.knows_origin(origin):
            response.headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = origin
            response.headers[hdrs.ACCESS_CONTROL_EXPOSE_HEADERS] = exposed
            response.headers[hdrs.VARY] = hdrs.ORIGIN

    return add
