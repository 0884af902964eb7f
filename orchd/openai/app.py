"""The bridge's aiohttp application: the same gate as the server's, errors in OpenAI's shape, its routes."""

from __future__ import annotations

from aiohttp import hdrs, web

from orchd.client import Client
from orchd.http.auth import Gate
from orchd.http.middleware import allow_origin, enveloper, gatekeeper
from orchd.openai.errors import envelope
from orchd.openai.models import Models
from orchd.openai.routes import BRIDGE, ROUTES, Bridge
from orchd.settings.addresses import host_of, is_loopback
from orchd.settings.config import ServerConfig


def create_app(client: Client, config: ServerConfig, *, token: str, address: str) -> web.Application:
    """The routes over a client.

    Args:
        client: Of the server; open for as long as the application serves.
        config: Limits, allowed hosts and origins.
        token: What every request must carry.
        address: What the socket is bound to, which tells whether a foreign Host header is an attack.
    """
    gate = Gate(
        token,
        bound_to_loopback=is_loopback(host_of(address)),
        allowed_hosts=config.allowed_hosts,
        allowed_origins=config.allowed_origins,
    )
    guard = gatekeeper(gate, preflight=_preflight, envelope=envelope)
    app = web.Application(client_max_size=config.max_body_bytes, middlewares=[guard, enveloper(envelope)])
    app[BRIDGE] = Bridge(client, Models(client))
    app.add_routes(ROUTES)
    app.on_response_prepare.append(allow_origin(gate, exposed="Retry-After, retry-after-ms"))
    return app


def _preflight(request: web.Request) -> dict[str, str]:
    """Whatever headers a page's client wants to send: OpenAI's sends a dozen, and more with each version."""
    return {
        "Access-Control-Allow-Methods": "GET, POST",
        "Access-Control-Allow-Headers": request.headers.get(
            hdrs.ACCESS_CONTROL_REQUEST_HEADERS, "Authorization, Content-Type"
        ),
        "Access-Control-Max-Age": "600",
    }
