"""Connections that take their time: a limit closes them, and there may be very many of them meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import time
from pathlib import Path

import pytest

from orchd.http import body, connection
from testkit.harness import TOKEN, Running, serving

BEARER = f"Authorization: Bearer {TOKEN}\r\n"
HEAD = f"POST /v1/tasks HTTP/1.1\r\nHost: localhost\r\n{BEARER}"


async def dribbled(server: Running, begin: bytes, drop: bytes) -> tuple[bytes, float]:
    """Send a beginning, then a drop every 20 ms until the server closes; its answer and the seconds it took."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(begin)
    began = time.monotonic()

    async def drip() -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                await asyncio.sleep(0.02)
                writer.write(drop)
                await writer.drain()

    dripping = asyncio.create_task(drip())
    answer = b""
    try:
        with contextlib.suppress(ConnectionError):  # the server closes while we still send
            while more := await asyncio.wait_for(reader.read(1 << 16), 10):
                answer += more
        return answer, time.monotonic() - began
    finally:
        dripping.cancel()
        writer.close()


UNFINISHED = {"nothing": (b"", b""), "line": (b"POST /v1/ta", b"x"), "headers": (f"{HEAD}X-A: ".encode(), b"x")}


@pytest.mark.parametrize(("begin", "drop"), UNFINISHED.values(), ids=UNFINISHED)
async def test_a_head_that_does_not_end_is_cut_off(
    tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch, begin: bytes, drop: bytes
) -> None:
    monkeypatch.setattr(connection, "IDLE_S", 0.4)
    async with serving(tiny_model_path) as server:
        answer, seconds = await dribbled(server, begin, drop)
    assert answer == b""
    assert 0.3 < seconds < 5


async def test_a_connection_that_says_nothing_more_is_closed(
    tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "IDLE_S", 0.4)
    async with serving(tiny_model_path) as server:
        answer, seconds = await dribbled(
            server, f"GET /health HTTP/1.1\r\nHost: localhost\r\n{BEARER}\r\n".encode(), b""
        )
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert 0.3 < seconds < 5


async def test_a_stream_is_not_idle_however_long_it_is_silent(
    tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "IDLE_S", 0.2)
    async with serving(tiny_model_path) as server:
        server.brake.hold()
        async with server.listen(await server.submit(max_tokens=3)) as listener:
            await listener.block()
            await asyncio.sleep(0.6)
            server.brake.release()
            assert [event.kind async for event in listener] == ["token", "token", "token", "end"]


@pytest.mark.parametrize("how", ["Content-Length: 90000\r\n\r\n{", "Transfer-Encoding: chunked\r\n\r\n"])
async def test_a_body_that_does_not_end_is_refused(
    tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(body, "BODY_S", 0.4)
    monkeypatch.setattr(connection, "LINGER_S", 0.2)
    drop = b" " if "Length" in how else b"1\r\n \r\n"
    async with serving(tiny_model_path) as server:
        for path in ("/v1/tasks", "/v1/pools/default/reload"):
            answer, seconds = await dribbled(server, (HEAD.replace("/v1/tasks", path) + how).encode(), drop)
            assert answer.startswith(b"HTTP/1.1 400 ")
            error = json.loads(answer.partition(b"\r\n\r\n")[2])
            assert (error["code"], "did not arrive within" in error["message"]) == ("INVALID_PARAMS", True)
            assert 0.3 < seconds < 5
        assert await server.total("tasks_rejected_total", reason="INVALID_PARAMS") == 1


async def test_a_body_that_comes_in_two_parts_is_a_body(tiny_model_path: Path) -> None:
    body = b'{"prompt":"the","max_tokens":1}'
    async with serving(tiny_model_path) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body[:9])
        await asyncio.sleep(0.1)
        writer.write(body[9:])
        assert (await asyncio.wait_for(reader.readline(), 5)).startswith(b"HTTP/1.1 202 ")
        writer.close()


def test_the_limits_are_what_the_documentation_says() -> None:
    assert (connection.IDLE_S, body.BODY_S, connection.LINGER_S) == (75, 60, 5)


async def test_two_thousand_idle_connections_are_no_burden(tiny_model_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 4500:
        pytest.skip(f"both ends of 2,000 connections take 4,000 descriptors, and the limit here is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4500), hard))
    try:
        async with serving(tiny_model_path) as server:
            idle = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(2000)]
            for _, writer in idle[::2]:
                writer.write(b"GET /heal")
            answers = []
            for _ in range(20):
                began = time.monotonic()
                assert (await server.request("GET", "/health")).status == 200
                answers.append(time.monotonic() - began)
            assert (await server.run(max_tokens=8))[-1].data["tokens_out"] == 8
            print(f"/health beside 2,000 idle connections: median {1000 * sorted(answers)[10]:.1f} ms")
            assert sorted(answers)[10] < 0.5
            for _, writer in idle:
                writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
