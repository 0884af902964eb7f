"""Every error of every route, and of what is no route, has the one envelope."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from testkit.harness import TOKEN, Running, serving
from tests.http.envelope import assert_envelope

ROUTES = {
    "/v1/tasks": "POST",
    "/v1/tasks/x/stream": "GET",
    "/v1/pools/default/reload": "POST",
    "/health": "GET",
    "/metrics": "GET",
}
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "TRACE", "OPTIONS")
NOWHERE = [
    "/",
    "/v1",
    "/v1/tasks/",
    "/v1/tasks/x",
    "/v1/tasks/x/stream/",
    "/v1/tasks//stream",
    "/v2/tasks",
    "/V1/TASKS",
    "/health/",
    "/healthz",
    "/v1/pools",
    "/v1/pools/default",
    "/v1/pools/default/drain",
    "/v1/artifacts",
    "/v1/capabilities",
    "/favicon.ico",
    "/../../etc/passwd",
    "/%2e%2e/%00",
    "/%ED%A0%80",
    "/" + "x" * 4000,
]
HEAD = f"Host: localhost\r\nAuthorization: Bearer {TOKEN}\r\n"
MALFORMED = {
    "not HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "an unknown method": f"BREW /health HTTP/1.1\r\n{HEAD}\r\n".encode(),
    "a version to come": f"GET /health HTTP/9.9\r\n{HEAD}\r\n".encode(),
    "spaces in the path": f"GET /a b HTTP/1.1\r\n{HEAD}\r\n".encode(),
    "a header without a name": f"GET /health HTTP/1.1\r\n{HEAD}: x\r\n\r\n".encode(),
    "a header without a colon": f"GET /health HTTP/1.1\r\n{HEAD}nonsense\r\n\r\n".encode(),
    "NUL in a header": f"GET /health HTTP/1.1\r\n{HEAD}X: a\0b\r\n\r\n".encode(),
    "a long header": f"GET /health HTTP/1.1\r\n{HEAD}X: {'x' * 20_000}\r\n\r\n".encode(),
    "a long path": f"GET /{'x' * 20_000} HTTP/1.1\r\n{HEAD}\r\n".encode(),
    "a thousand headers": f"GET /health HTTP/1.1\r\n{HEAD}".encode() + b"X: x\r\n" * 1000 + b"\r\n",
    "two lengths": f"POST /v1/tasks HTTP/1.1\r\n{HEAD}Content-Length: 2\r\nContent-Length: 3\r\n\r\n{{}}".encode(),
    "a negative length": f"POST /v1/tasks HTTP/1.1\r\n{HEAD}Content-Length: -1\r\n\r\n".encode(),
    "a length and chunks": (
        f"POST /v1/tasks HTTP/1.1\r\n{HEAD}Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    ).encode(),
    "an unknown expectation": f"GET /health HTTP/1.1\r\n{HEAD}Expect: the-unexpected\r\n\r\n".encode(),
    "an unknown expectation nowhere": f"GET /nowhere HTTP/1.1\r\n{HEAD}Expect: the-unexpected\r\n\r\n".encode(),
}


async def _send(server: Running, data: bytes) -> tuple[bytes, bytes]:
    """The head and the body of the answer to some bytes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(data)
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    length = next(
        int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")
    )
    body = await asyncio.wait_for(reader.readexactly(length), 5)
    writer.close()
    return head, body


@pytest.mark.parametrize("path", NOWHERE, ids=lambda path: path[:30])
async def test_there_are_five_routes_and_no_more(tiny_model_path: Path, path: str) -> None:
    async with serving(tiny_model_path) as server:
        for method in ("GET", "POST"):
            assert_envelope(await server.request(method, path), 404, "NOT_FOUND")


@pytest.mark.parametrize("path", ROUTES)
async def test_the_wrong_method_is_405_and_names_the_right_one(tiny_model_path: Path, path: str) -> None:
    async with serving(tiny_model_path) as server:
        for method in METHODS:
            if method != ROUTES[path]:
                answer = await server.request(method, path)
                assert ROUTES[path] in assert_envelope(answer, 405, "METHOD_NOT_ALLOWED")
                assert answer.headers["Allow"] == ROUTES[path]


@pytest.mark.parametrize("path", ROUTES)
async def test_head_has_no_body(tiny_model_path: Path, path: str) -> None:
    async with serving(tiny_model_path) as server:
        answer = await server.request("HEAD", path)
    assert (answer.status, answer.body) == (405, b"")
    assert answer.headers["Allow"] == ROUTES[path]


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
async def test_what_is_not_http_gets_the_envelope_too(tiny_model_path: Path, data: bytes) -> None:
    async with serving(tiny_model_path) as server:
        head, body = await _send(server, data)
        assert head.split()[1] == b"400"
        assert b"Content-Type: application/json" in head
        answer = json.loads(body)
        assert set(answer) == {"code", "message", "engine"}
        assert answer["code"] == "INVALID_PARAMS"
        assert TOKEN not in answer["message"]
        assert (await server.request("GET", "/health")).status == 200


BAD_RELOADS = {
    "not JSON": (b"{", "not JSON"),
    "not an object": (b"[]", "object"),
    "an unknown field": (b'{"model_ref":"a"}', "model_ref; did you mean new_model_ref?"),
    "a wrong type": (b'{"new_model_ref":1}', "new_model_ref"),
    "oversized": (b" " * (1 << 20) + b"{}", "max_body_bytes"),
}


@pytest.mark.parametrize(("body", "named"), BAD_RELOADS.values(), ids=BAD_RELOADS)
async def test_a_bad_reload_body_is_explained_and_is_no_refused_task(
    tiny_model_path: Path, body: bytes, named: str
) -> None:
    async with serving(tiny_model_path) as server:
        answer = await server.request("POST", "/v1/pools/default/reload", body=body)
        assert named in assert_envelope(answer, 400, "INVALID_PARAMS")
        assert await server.total("tasks_rejected_total") == 0


async def test_chunks_that_are_none_are_the_clients_mistake(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path) as server:
        data = f"POST /v1/tasks HTTP/1.1\r\n{HEAD}Transfer-Encoding: chunked\r\n\r\nnonsense\r\n\r\n".encode()
        head, body = await _send(server, data)
        assert head.split()[1] == b"400"
        assert json.loads(body)["code"] == "INVALID_PARAMS"


async def test_a_body_may_come_in_chunks_and_after_a_continue(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(
            f"POST /v1/tasks HTTP/1.1\r\n{HEAD}Transfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n".encode()
        )
        assert (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)).startswith(b"HTTP/1.1 100")
        for byte in b'{"prompt":"the"}':
            writer.write(b"1\r\n%c\r\n" % byte)
            await writer.drain()
        writer.write(b"0\r\n\r\n")
        assert (await asyncio.wait_for(reader.readline(), 5)).startswith(b"HTTP/1.1 202 ")
        writer.close()


async def test_one_connection_serves_errors_and_answers(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        requests = [f"GET {path} HTTP/1.1\r\n{HEAD}\r\n" for path in ("/nowhere", "/v1/tasks", "/health")]
        writer.write("".join(requests).encode())  # pipelined
        statuses = []
        for _ in requests:
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
            statuses.append(int(head.split()[1]))
            await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split()[0]))
        writer.close()
    assert statuses == [404, 405, 200]


async def test_a_client_that_leaves_while_it_sends_harms_nobody(
    tiny_model_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(tiny_model_path) as server:
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(f'POST /v1/tasks HTTP/1.1\r\n{HEAD}Content-Length: 1000\r\n\r\n{{"prompt"'.encode())
        await writer.drain()
        writer.transport.abort()
        assert (await server.run(max_tokens=4))[-1].kind == "end"
        assert await server.total("tasks_rejected_total") == 0
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_a_defect_is_a_sentence_without_internals(
    tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("orchd.service.Service.health", lambda _: dict[str, None]()["secret"])
    async with serving(tiny_model_path) as server:
        message = assert_envelope(await server.request("GET", "/health"), 500, "INTERNAL")
    assert "secret" not in message
    assert "Traceback" not in message
    assert "KeyError: 'secret'" in caplog.text
