"""Bytes that no decent client sends: an envelope or a closed connection, nothing slipped in, and the server serves on.

Single malformed requests: ``tests/http/test_errors.py``. Bodies that are no tasks: ``tests/http/test_refused.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
from pathlib import Path

import pytest

from testkit.harness import TOKEN, Running, new_id, serving
from tests.http.envelope import assert_envelope

HOST = "Host: localhost\r\n"
AUTH = f"{HOST}Authorization: Bearer {TOKEN}\r\n"
HEALTH = f"GET /health HTTP/1.1\r\n{AUTH}\r\n"


async def exchange(server: Running, *parts: str | bytes, patience_s: float = 5) -> bytes:
    """Send parts in a row and say that this was all; everything that comes back."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    answer = b""
    with contextlib.suppress(ConnectionError):
        for part in parts:
            writer.write(part.encode() if isinstance(part, str) else part)
            await writer.drain()
        while more := await asyncio.wait_for(reader.read(1 << 20), patience_s):
            answer += more
    writer.close()
    return answer


def statuses(answers: bytes) -> list[int]:
    return [int(found) for found in re.findall(rb"HTTP/1\.[01] (\d+) ", answers)]


def _smuggling(task_id: str) -> dict[str, str]:
    """Requests whose end two readers could see in different places; what would slip in is a submit with this id."""
    body = f'{{"prompt":"the","max_tokens":1,"task_id":"{task_id}"}}'
    inner = f"POST /v1/tasks HTTP/1.1\r\n{AUTH}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    begin, stop = f"POST /v1/pools/nowhere/reload HTTP/1.1\r\n{AUTH}", f"0\r\n\r\n{inner}"
    length = f"Content-Length: {len(stop)}\r\n"
    chunked = "Transfer-Encoding: chunked\r\n"
    return {
        "length and chunks": f"{begin}{length}{chunked}\r\n{stop}",
        "chunks and length": f"{begin}{chunked}{length}\r\n{stop}",
        "two lengths": f"{begin}Content-Length: 0\r\n{length}\r\n{stop}",
        "a list of lengths": f"{begin}Content-Length: 0, {len(stop)}\r\n\r\n{stop}",
        "a signed length": f"{begin}Content-Length: +0\r\n\r\n{inner}",
        "a length in hex": f"{begin}Content-Length: 0x0\r\n\r\n{inner}",
        "chunks twice": f"{begin}{chunked}{chunked}\r\n{stop}",
        "chunks and identity": f"{begin}Transfer-Encoding: chunked, identity\r\n\r\n{stop}",
        "an unknown coding": f"{begin}Transfer-Encoding: xchunked\r\n{length}\r\n{stop}",
        "chunks with a tab": f"{begin}Transfer-Encoding:\tchunked, x\r\n{length}\r\n{stop}",
        "a space before the colon": f"{begin}Transfer-Encoding : chunked\r\n{length}\r\n{stop}",
        "a folded header": f"{begin}X: y\r\n {chunked}{length}\r\n{stop}",
        "a bare CR": f"{begin}X: y\r{chunked}{length}\r\n{stop}",
        "a size too large": f"{begin}{chunked}\r\nffffffffffffffff0\r\n\r\n{inner}",
        "a negative size": f"{begin}{chunked}\r\n-1\r\n\r\n{inner}",
        "a size with an underscore": f"{begin}{chunked}\r\n0_0\r\n\r\n{inner}",
    }


@pytest.mark.parametrize("how", _smuggling(""))
async def test_nothing_is_smuggled_in(tiny_model_path: Path, how: str) -> None:
    """Whatever is ambiguous is refused as a whole, and the connection closed: the rest is not read as a request."""
    task_id = new_id()
    async with serving(tiny_model_path) as server:
        answer = await exchange(server, _smuggling(task_id)[how])
        assert statuses(answer) == [400]
        assert (await server.request("GET", f"/v1/tasks/{task_id}/stream")).status == 404


async def test_a_request_hidden_in_a_body_stays_a_body(tiny_model_path: Path) -> None:
    task_id = new_id()
    hidden = f'POST /v1/tasks HTTP/1.1\r\n{AUTH}\r\n{{"prompt":"the","task_id":"{task_id}"}}'
    async with serving(tiny_model_path) as server:
        head = f"POST /v1/tasks HTTP/1.1\r\n{AUTH}Content-Length: {len(hidden)}\r\n\r\n"
        answer = await exchange(server, head + hidden, HEALTH.replace("\r\n\r\n", "\r\nConnection: close\r\n\r\n"))
        assert statuses(answer) == [400, 200]
        assert (await server.request("GET", f"/v1/tasks/{task_id}/stream")).status == 404


async def test_pipelined_requests_are_answered_in_order(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path) as server:
        last = HEALTH.replace("\r\n\r\n", "\r\nConnection: close\r\n\r\n")
        answer = await exchange(server, (HEALTH + f"GET /nowhere HTTP/1.1\r\n{AUTH}\r\n") * 200 + last, patience_s=15)
        assert statuses(answer) == [200, 404] * 200 + [200]


async def test_a_flood_of_requests_whose_answers_nobody_reads_is_held_back(tiny_model_path: Path) -> None:
    """The server stops reading when its answers are not taken: it does not store them."""
    async with serving(tiny_model_path, send_buffer_bytes=4096) as server:
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        flood = f"GET /metrics HTTP/1.1\r\n{AUTH}\r\n".encode() * 1000
        sent = 0
        with contextlib.suppress(asyncio.TimeoutError):
            while sent < 400:
                writer.write(flood)
                sent += 1
                await asyncio.wait_for(writer.drain(), 1)
        assert sent < 400, "all of 40 MB of requests were taken in"
        assert (await server.request("GET", "/health")).status == 200
        writer.transport.abort()


async def test_a_megabyte_of_brackets_is_a_mistake_like_any_other(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path) as server:
        for body in (b"[" * (1 << 20), b'{"a":' * (200 << 10), b'{"prompt":"' + b"[" * (1 << 19)):
            assert_envelope(await server.post(body), 400, "INVALID_PARAMS")


async def test_any_bytes_get_an_envelope_or_nothing(tiny_model_path: Path) -> None:
    chance = random.Random(0)
    async with serving(tiny_model_path) as server:
        for _ in range(60):
            await asyncio.gather(*(_probe(server, _nonsense(chance)) for _ in range(10)))
        assert (await server.request("GET", "/health")).status == 200


PIECES = [b"1\r\n{\r\n", b"0\r\n\r\n", b"\r\n", b"zz\r\n", b"5;x=y\r\nabcde\r\n", b"\0", b"\xff", b"GET / HTTP/1.1\r\n"]


def _nonsense(chance: random.Random) -> bytes:
    if chance.random() < 0.5:
        return chance.randbytes(chance.randint(1, 200))
    return b"".join(chance.choices(PIECES, k=chance.randint(1, 12)))


async def _probe(server: Running, data: bytes) -> None:
    for head in (b"", f"POST /v1/tasks HTTP/1.1\r\n{AUTH}Transfer-Encoding: chunked\r\n\r\n".encode()):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(head + data)
        writer.write_eof()
        with contextlib.suppress(ConnectionError, asyncio.TimeoutError):
            answer = await asyncio.wait_for(reader.read(), 0.3)
            assert not answer or answer.split()[1] == b"400", answer
            if answer:
                assert set(json.loads(answer.partition(b"\r\n\r\n")[2])) == {"code", "message", "engine"}
        writer.close()
