"""The bridge as a process: from its settings to an exit code. Nothing here loads an engine."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable

from orchd.client import Client
from orchd.errors import ConfigError
from orchd.http.connection import serving
from orchd.openai.app import create_app
from orchd.openai.errors import envelope
from orchd.process import listen, raise_file_limit, stop_on_signals
from orchd.settings.config import ServerConfig

PORT = 8738


def serve(
    server_url: str, config: ServerConfig, *, token: str, host: str, port: int, on_ready: Callable[[str], None]
) -> int:
    """Serve until SIGINT, SIGTERM or SIGHUP; a second one leaves at once.

    Args:
        server_url: Of the orchd server; it need not be there yet.
        config: Limits, allowed hosts and origins, and how long streams have at the end.
        token: The server's, and what requests must carry.
        host: Where to listen.
        port: Where to listen; 0 picks a free one.
        on_ready: Is told the address once requests are taken.

    Returns:
        The process's exit code.

    Raises:
        ConfigError: An address or the token cannot be used.
    """
    raise_file_limit()
    try:
        client = Client(server_url, token=token)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    with contextlib.closing(listen(host, port)) as listening:
        asyncio.run(_run(client, config, listening, token=token, on_ready=on_ready))
    return 0


async def _run(
    client: Client, config: ServerConfig, listening: socket.socket, *, token: str, on_ready: Callable[[str], None]
) -> None:
    stop = asyncio.Event()
    stop_on_signals(stop)
    address, port = listening.getsockname()[:2]
    async with client:
        app = create_app(client, config, token=token, address=address)
        async with serving(app, listening, envelope=envelope, shutdown_s=config.shutdown_grace_s):
            on_ready(f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}")
            await stop.wait()
