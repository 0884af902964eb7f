"""The aiohttp application: gate, error envelopes, five routes."""

from __future__ import annotations

import asyncio

from aiohttp import web

from orchd.http import routes
from orchd.http.auth import Gate
from orchd.http.middleware import allow_origin, enveloper, gatekeeper
from orchd.metrics import Metrics
from orchd.service import Service
from orchd.settings.addresses import host_of, is_loopback
from orchd.settings.config import ServerConfig

_PREFLIGHT = {
    "Access-Control-Allow-Methods": "GET, POST",
    "Access-Control-Allow-Headers": "Authorization, Content-Type, Last-Event-ID",
    "Access-Control-Max-Age": "600",
}


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
    guard = gatekeeper(gate, preflight=lambda request: _PREFLIGHT, token_in_query=_is_stream)
    app = web.Application(client_max_size=config.max_body_bytes, middlewares=[guard, enveloper()])
    app[routes.SERVICE] = service
    app[routes.METRICS] = metrics
    app[routes.LARGE_BODIES] = asyncio.Lock()
    app.add_routes(routes.ROUTES)
    app.on_response_prepare.append(allow_origin(gate, exposed="Retry-After, X-Backoff-Ms"))
    return app


def _is_stream(request: web.Request) -> bool:
    resource = request.match_info.route.resource
    return resource is not None and resource.canonical == routes.STREAM_PATH
