"""Names and addresses of hosts: in one spelling, on this machine, as something to listen on."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import re
import socket
from typing import Any

from orchd.errors import ConfigError

_NETLOC = re.compile(r"(?:\[(?P<ipv6>[^\[\]/?#@\\\s]+)\]|(?P<name>[^\[\]:/?#@\\\s]+))(?::(?P<port>[0-9]{0,5}))?")


def host_of(text: str) -> str:
    """The host of ``host`` or ``host:port`` in one spelling; empty if it cannot be one.

    Lower case, without port, brackets and final dot, and an IPv6 address as short as it can be.
    """
    with contextlib.suppress(ValueError):
        return str(ipaddress.IPv6Address(text))
    found = _NETLOC.fullmatch(text)
    if found is None or int(found["port"] or 0) > 65535:
        return ""
    if found["ipv6"]:
        return host_of(found["ipv6"]) if ":" in found["ipv6"] else ""
    return found["name"].lower().removesuffix(".")


def is_loopback(host: str) -> bool:
    """Whether a host as `host_of` gives it, or an address, stands for this machine."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def resolve(host: str, port: int) -> tuple[socket.AddressFamily, Any]:
    """What `socket.socket` and `bind` want to know.

    Raises:
        ConfigError: The host, which is ``server.host``, has no address.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, ValueError) as error:  # ValueError: a label over 63 characters, a NUL, bytes that are not text
        reason = getattr(error, "strerror", None) or "not a valid host name"
        shown = repr(host) if len(host) <= 80 else f"{host[:77]!r}..."
        raise ConfigError(
            f"server.host {shown} is not an address of this machine ({reason}); use 127.0.0.1, or one of its addresses"
        ) from None
    return family, address


def bind_remedy(error: OSError) -> str:
    """What to do about an address that cannot be listened on."""
    if error.errno == errno.EADDRNOTAVAIL:
        return "this machine does not have that address; use 127.0.0.1, or one of its own with --host"
    if error.errno == errno.EACCES:
        return "only root may use ports below 1024; choose another with --port"
    return "stop what uses it, or choose another port with --port"
