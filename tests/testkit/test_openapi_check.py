"""The checker that holds every answer of a test to ``openapi/``: what it lets pass, and what it finds."""

from __future__ import annotations

import json
from pathlib import Path

import aiohttp
import aiohttp.web
import pytest

from orchd import schemas
from orchd.service import Service
from testkit import openapi_check
from testkit.harness import serving
from testkit.openapi_check import (
    ContractError,
    check,
)

HEADERS = {"Content-Type": "application/json"}
ACCEPTED = (
    b'{"task_id":"6f1c9f0e-8a53-4f0b-9d0c-3a1f5c2b7e44","queue_position":0,"predicted_start_ms":1,"backoff_ms":0}'
)
REFUSED = b'{"code":"ADMISSION_REJECT","message":"full","engine":"llamacpp"}'
PAUSE = {"Retry-After": "1", "X-Backoff-Ms": "12"}
EVENTS = b'id: 0\nevent: started\ndata: {"queue_position":0,"predicted_start_ms":0}\n\n'
FIGURES = b'"tokens_in":1,"tokens_cached":0,"tokens_out":0,"decode_ms":0'
END = b'id: 1\nevent: end\ndata: {%b,"finish_reason":"stop"}\n\n' % FIGURES
STREAM = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
ENVELOPE = b'{"code":"NOT_FOUND","message":"no","engine":"llamacpp"}'


@pytest.mark.parametrize(
    ("method", "path", "status", "headers", "body"),
    [
        ("POST", "/v1/tasks", 202, HEADERS, ACCEPTED),
        ("POST", "/v1/tasks", 429, HEADERS | PAUSE, REFUSED),
        ("GET", "/v1/tasks/x/stream", 200, STREAM, EVENTS + b": keep-alive\n\n" + END),
        ("GET", "/v1/tasks/x/stream", 200, STREAM, EVENTS),
        ("GET", "/v1/tasks/x/stream", 204, {}, b""),
        ("GET", "/nowhere", 404, HEADERS, ENVELOPE),
        ("HEAD", "/health", 405, HEADERS | {"Allow": "GET"}, b""),
    ],
)
def test_the_checker_lets_right_answers_pass(
    method: str, path: str, status: int, headers: dict[str, str], body: bytes
) -> None:
    check(method, path, status, headers, body)


@pytest.mark.parametrize(
    ("method", "path", "status", "headers", "body"),
    [
        ("POST", "/v1/tasks", 201, HEADERS, ACCEPTED),
        ("POST", "/v1/tasks", 202, HEADERS, ACCEPTED.replace(b"}", b',"correlation_id":"x"}')),
        ("POST", "/v1/tasks", 202, HEADERS, ACCEPTED.replace(b',"backoff_ms":0', b"")),
        ("POST", "/v1/tasks", 202, HEADERS, ACCEPTED.replace(b":1,", b":-1,")),
        ("POST", "/v1/tasks", 202, HEADERS, ACCEPTED.replace(b"6f1c", b"zzzz")),
        ("POST", "/v1/tasks", 202, HEADERS | {"X-Correlation-Id": "x"}, ACCEPTED),
        ("POST", "/v1/tasks", 202, {"Content-Type": "text/plain"}, ACCEPTED),
        ("POST", "/v1/tasks", 429, HEADERS, REFUSED),
        ("POST", "/v1/tasks", 429, HEADERS | PAUSE | {"Retry-After": "0"}, REFUSED),
        ("POST", "/v1/tasks", 429, HEADERS | PAUSE, REFUSED.replace(b"}", b',"policy_label":"x"}')),
        ("POST", "/v1/tasks", 429, HEADERS | PAUSE, REFUSED.replace(b"ADMISSION_REJECT", b"INTERNAL")),
        ("GET", "/v1/tasks/x/stream", 200, STREAM, EVENTS + END.replace(b"id: 1", b"id: 2")),
        ("GET", "/v1/tasks/x/stream", 200, STREAM, END.replace(b"event: end", b"event: started")),
        ("GET", "/v1/tasks/x/stream", 200, STREAM, EVENTS + END + END.replace(b"id: 1", b"id: 2")),
        ("GET", "/v1/tasks/x/stream", 200, STREAM, EVENTS + END.replace(b"event: end", b"event: metrics")),
        ("GET", "/v1/tasks/x/stream", 200, STREAM, EVENTS + END.replace(b'"stop"', b'"error"')),
        ("GET", "/v1/tasks/x/stream", 204, {}, b"x"),
        ("GET", "/nowhere", 200, HEADERS, b"{}"),
        ("GET", "/nowhere", 404, HEADERS, ENVELOPE.replace(b"NOT_FOUND", b"INTERNAL")),
        ("GET", "/nowhere", 404, HEADERS | {"X-Request-Id": "1"}, ENVELOPE),
        ("PUT", "/health", 405, HEADERS, ENVELOPE.replace(b"NOT_FOUND", b"METHOD_NOT_ALLOWED")),
    ],
)
def test_the_checker_finds_wrong_answers(
    method: str, path: str, status: int, headers: dict[str, str], body: bytes
) -> None:
    with pytest.raises(ContractError):
        check(method, path, status, headers, body)


def test_the_checker_finds_a_request_that_should_not_have_been_taken() -> None:
    with pytest.raises(ContractError, match="tenant"):
        check("POST", "/v1/tasks", 202, HEADERS, ACCEPTED, sent=b'{"prompt": "a", "tenant": "x"}')
    with pytest.raises(ContractError):
        check("POST", "/v1/tasks", 202, HEADERS, ACCEPTED, sent=b'{"prompt": "a", "messages": []}')


async def test_a_traced_session_raises_what_the_checker_finds() -> None:
    async def wrong(request: aiohttp.web.Request) -> aiohttp.web.Response:
        return aiohttp.web.json_response({"status": "ok", "pools": [], "request_id": 1})

    app = aiohttp.web.Application()
    app.router.add_get("/health", wrong)
    runner = aiohttp.web.AppRunner(app)
    await runner.setup()
    await aiohttp.web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        async with aiohttp.ClientSession(trace_configs=[openapi_check.trace()]) as session:
            async with session.get(f"{url}/health") as response:
                with pytest.raises(ContractError, match="request_id"):
                    await response.read()
            with pytest.raises(ContractError):
                await session.get(f"{url}/v1/tasks/x/stream")
    finally:
        await runner.cleanup()


async def test_the_harness_checks_every_answer(tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def answer(self: Service, request: schemas.TaskRequest) -> dict[str, object]:
        return {**json.loads(ACCEPTED), "correlation_id": "x"}

    async with serving(tiny_model_path) as server:
        monkeypatch.setattr(Service, "submit", answer)
        with pytest.raises(ContractError, match="correlation_id"):
            await server.post(prompt="the")
