"""Who gets in: the Host a request was made to, the origin of the page that made it, and the one token."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Iterable
from urllib.parse import urlsplit

from aiohttp import hdrs, web


def is_loopback(host: str) -> bool:
    """Whether a host name or address, without port, stands for this machine."""
    host = host.lower()
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _host_name(netloc: str) -> str:
    """The host of ``host:port``, lower case, no port; empty if it cannot be one."""
    try:
        parts = urlsplit(f"//{netloc}")
        return (parts.hostname or "") if parts.port is None or parts.port >= 0 else ""
    except ValueError:
        return ""


class Gate:
    """Decides over a request before any route sees it.

    Args:
        token: The one token.
        bound_to_loopback: Whether the server listens on loopback only; then a foreign ``Host`` is DNS rebinding.
        allowed_hosts: Further ``Host`` names, without port.
        allowed_origins: Origins whose pages may use the server; None for loopback origins on any port.
    """

    def __init__(
        self,
        token: str,
        *,
        bound_to_loopback: bool,
        allowed_hosts: Iterable[str],
        allowed_origins: Iterable[str] | None,
    ) -> None:
        self._token = token.encode()
        self._check_host = bound_to_loopback
        self._hosts = {host.lower() for host in allowed_hosts}
        self._origins = None if allowed_origins is None else {origin.lower() for origin in allowed_origins}

    def knows_host(self, request: web.Request) -> bool:
        """Whether the request was made to a name this server has."""
        if not self._check_host:
            return True
        host = _host_name(request.headers.get(hdrs.HOST, ""))
        return is_loopback(host) or host in self._hosts

    def knows_origin(self, origin: str) -> bool:
        """Whether pages of this origin may use the server."""
        if self._origins is not None:
            return origin.lower() in self._origins
        scheme, _, netloc = origin.partition("://")
        return scheme in ("http", "https") and is_loopback(_host_name(netloc))

    def knows_token(self, request: web.Request, *, query_too: bool) -> bool:
        """Whether the request carries the token, compared in constant time."""
        scheme, _, given = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
        if scheme.lower() != "bearer":
            given = ""
        if not given and query_too:
            given = request.query.get("access_token", "")
        return hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), self._token)
