"""Clients that stop reading: what the server keeps for them is bounded, and nobody else notices."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import tracemalloc
from pathlib import Path

from testkit.harness import TOKEN, serving

LISTENERS = 40


async def test_listeners_that_never_read_cost_a_bounded_buffer_each(tiny_model_path: Path) -> None:
    """A task's events are kept once for all; an unread listener holds at most what was written to it in one go.

    It is the same after a second as after a minute: nothing more is written until something is read.
    """
    async with serving(tiny_model_path, pool={"ctx": 2048}, send_buffer_bytes=4096) as server:
        server.brake.hold()
        task_id = await server.submit(max_tokens=1500)
        head = f"GET /v1/tasks/{task_id}/stream HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n\r\n"
        with contextlib.ExitStack() as open_sockets:
            for _ in range(LISTENERS):
                sock = open_sockets.enter_context(socket.socket())
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
                sock.connect(("127.0.0.1", server.port))
                sock.sendall(head.encode())
            await asyncio.sleep(0.2)
            gc.collect()
            tracemalloc.start()
            try:
                server.brake.release()
                events = await server.events(task_id)
                size = sum(len(event.data.get("t", "")) + 40 for event in events)
                await asyncio.sleep(0.3)
                first, _ = tracemalloc.get_traced_memory()
                await asyncio.sleep(1)
                held, _ = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
            print(f"{LISTENERS} unread listeners of {size >> 10} KiB of events hold {held >> 10} KiB")
            assert held < LISTENERS * (2 * size + (64 << 10)) + (8 << 20)
            assert held < 1.1 * first + (1 << 20)
            assert (await server.run(max_tokens=8))[-1].data["tokens_out"] == 8
