"""The aiohttp application: gate, error envelopes, five routes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import hdrs, web
from aiohttp.typedefs import Middleware

from orchd.errors import Code, TaskError
from orchd.http import errors, routes
from orchd.http.auth import Gate
from orchd.metrics import Metrics
from orchd.service import Service
from orchd.settings.addresses import host_of, is_loopback
from orchd.settings.config import ServerConfig

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_PREFLIGHT = {
    "Access-Control-Allow-Methods": "GET, POST",
    "Access-Control-Allow-Headers": "Authorization, Content-Type, Last-Event-ID",
    "Access-Control-Max-Age": "600",
}
_EXPOSED = "Retry-After, X-Backoff-Ms"


def create_app(
    service: Service, config: ServerConfig, *, token: str, metrics: Metrics, address: str | None = None
) -> web.Application:
    """The five routes over a service.

    Args:
        service: Does the work.
        config: Limits, allowed hosts and origins.
        token: What every request must carry.
        metrics: Renders ``/metrics``.
        address: What the socket is bound to, which tells whether a foreign Host header is an attack; ``config.host``
            is only what the owner calls it.
    """
    gate = Gate(
        token,
        bound_to_loopback=is_loopback(host_of(address or config.host)),
        allowed_hosts=config.allowed_hosts,
        allowed_origins=config.allowed_origins,
    )
    app = web.Application(client_max_size=config.max_body_bytes, middlewares=[_gatekeeper(gate), _enveloper])
    app[routes.SERVICE] = service
    app[routes.METRICS] = metrics
    app.add_routes(routes.ROUTES)
    app.on_response_prepare.append(_allow_origin(gate))
    return app


def _gatekeeper(gate: Gate) -> Middleware:
    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not gate.knows_host(request):
            message = "this Host is not allowed; use 127.0.0.1, or add the host to server.allowed_hosts"
            return errors.envelope(Code.FORBIDDEN, message)
        origin = request.headers.get(hdrs.ORIGIN)
        if origin is not None and not gate.knows_origin(origin):
            message = "pages from this Origin are not allowed; add the origin to server.allowed_origins"
            return errors.envelope(Code.FORBIDDEN, message)
        if origin is not None and request.method == "OPTIONS" and hdrs.ACCESS_CONTROL_REQUEST_METHOD in request.headers:
            return web.Response(status=204, headers=_PREFLIGHT)
        resource = request.match_info.route.resource
        streams = resource is not None and resource.canonical == routes.STREAM_PATH
        if not gate.knows_token(request, query_too=streams):
            sent = hdrs.AUTHORIZATION in request.headers or (streams and "access_token" in request.query)
            remedy = "send it as Authorization: Bearer TOKEN"
            message = (
                f"the token is wrong; read the server's, and {remedy}" if sent else f"the token is missing; {remedy}"
            )
            return errors.envelope(Code.UNAUTHORIZED, message, {hdrs.WWW_AUTHENTICATE: 'Bearer realm="orchd"'})
        return await handler(request)

    return check


@web.middleware
async def _enveloper(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except TaskError as error:
        return errors.from_task_error(error)
    except web.HTTPException as error:
        return errors.from_http_error(error, request)
    except ConnectionError:
        raise  # the client has disconnected: there is no one to answer
    except Exception as error:
        answer = errors.internal(error, request)
        if request.writer.output_size > 0:
            raise ConnectionError("a stream failed after it had begun; the connection can only be closed") from error
        return answer


def _allow_origin(gate: Gate) -> Callable[[web.Request, web.StreamResponse], Awaitable[None]]:
    async def add(request: web.Request, response: web.StreamResponse) -> None:
        origin = request.headers.get(hdrs.ORIGIN)
        if origin is not None and gate.knows_origin(origin):
            response.headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = origin
            response.headers[hdrs.ACCESS_CONTROL_EXPOSE_HEADERS] = _EXPOSED
            response.headers[hdrs.VARY] = hdrs.ORIGIN

    return add
