"""Who gets in: the Host a request was made to, the origin of the page that made it, and the one token."""

from __future__ import annotations

import hmac
from collections.abc import Iterable

from aiohttp import hdrs, web

from orchd.settings.addresses import host_of, is_loopback

_PORTS = {"http": "80", "https": "443"}


class Gate:
    """Decides over a request before any route sees it.

    Args:
        token: The one token.
        bound_to_loopback: Whether the server listens on loopback only; then a foreign ``Host`` is DNS rebinding.
        allowed_hosts: Further names or addresses that a ``Host`` may have, on any port.
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
        self._hosts = {host_of(host) for host in allowed_hosts} - {""}
        self._origins = None if allowed_origins is None else {_as_sent(origin) for origin in allowed_origins}

    def knows_host(self, request: web.Request) -> bool:
        """Whether the request was made to a name this server has."""
        if not self._check_host:
            return True
        host = host_of(request.headers.get(hdrs.HOST, ""))
        return is_loopback(host) or host in self._hosts

    def knows_origin(self, origin: str) -> bool:
        """Whether pages of this origin may use the server."""
        if self._origins is not None:
            return _as_sent(origin) in self._origins
        scheme, _, netloc = origin.partition("://")
        return scheme in _PORTS and is_loopback(host_of(netloc))

    def knows_token(self, request: web.Request, *, query_too: bool) -> bool:
        """Whether the request carries the token, compared in constant time."""
        scheme, _, given = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
        if scheme.lower() != "bearer":
            given = ""
        if not given and query_too:
            given = request.query.get("access_token", "")
        return hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), self._token)


def _as_sent(origin: str) -> str:
    """An origin as browsers send it: lower case, without its scheme's own port, an IPv6 address as short as can be."""
    scheme, separator, netloc = origin.lower().partition("://")
    host, _, port = netloc.rpartition(":")
    if not port.isdigit():
        host, port = netloc, ""
    if host.startswith("["):
        host = f"[{host_of(host)}]"
    return f"{scheme}{separator}{host}" + (f":{port}" if port not in ("", _PORTS.get(scheme)) else "")
