"""A client with many streams open at the same time, on a real server."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import AsyncExitStack, aclosing, suppress
from pathlib import Path

import pytest

from orchd.client import Client, End, NotReachable, Started
from testkit.harness import TOKEN, serving

STREAMS = 150
"""aiohttp gives a session 100 connections, and lets whoever wants one more wait without limit or error."""


async def test_streams_leave_room_for_everything_else(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path, queue={"capacity": 2}) as server, Client(server.url, token=TOKEN) as client:
        server.brake.hold()
        task_id = (await client.submit(prompt="the", max_tokens=8, ignore_eos=True)).task_id
        async with AsyncExitStack() as opened:
            streams = [await opened.enter_async_context(aclosing(client.follow(task_id))) for _ in range(STREAMS)]
            first = await asyncio.wait_for(asyncio.gather(*(anext(stream) for stream in streams)), 20)
            assert all(isinstance(event, Started) for event in first)
            health = await asyncio.wait_for(client.health(), 5)
            assert (health.status, health.ready) == ("ok", True)
            another = await asyncio.wait_for(client.submit(prompt="the", max_tokens=1), 5)
            server.brake.release()
            for stream in streams:
                *_, last = [event async for event in stream]
                assert isinstance(last, End)
                assert last.tokens_out == 8
            assert (await anext(client.follow(another.task_id))).event_id == "0"


@pytest.fixture
def dripping() -> Iterator[str]:
    """The address of a server that begins an answer and sends a byte of it now and then, for ever."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        over = threading.Event()

        def drip() -> None:
            with suppress(OSError):
                connection, _ = listening.accept()
                with connection:
                    connection.recv(1 << 16)
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
                    while not over.wait(0.05):
                        connection.sendall(b" ")

        thread = threading.Thread(target=drip)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        over.set()
        listening.shutdown(socket.SHUT_RDWR)
        thread.join(10)


async def test_an_answer_that_never_ends_is_given_up(dripping: str) -> None:
    async with Client(dripping, token=TOKEN, connect_timeout_s=0.2, answer_timeout_s=0.3) as client:
        with pytest.raises(NotReachable, match="timed out"):
            await asyncio.wait_for(client.health(), 10)
