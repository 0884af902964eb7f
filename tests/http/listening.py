"""Listeners that read so much and no more, and one without a client library."""

from __future__ import annotations

import asyncio
import socket

from testkit.harness import TOKEN, Event, Listener, Running


async def hear(listener: Listener, count: int) -> list[Event]:
    """The next so many events."""
    return [await listener.__anext__() for _ in range(count)]


async def raw_stream(
    server: Running, task_id: str, *, limit: int = 1 << 16
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A stream's connection, with a small buffer for what nobody reads."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", server.port))
    reader, writer = await asyncio.open_connection(sock=sock, limit=limit)
    head = f"GET /v1/tasks/{task_id}/stream HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n\r\n"
    writer.write(head.encode())
    return reader, writer
