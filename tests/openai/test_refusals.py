"""What goes wrong at the server, or on the way to it, in OpenAI's shape; and who gets in."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from testkit import stand_in as s
from testkit.bridge import Bridge, bridging
from testkit.harness import until
from testkit.process import free_port
from testkit.stand_in import TOKEN, StandIn
from tests.openai.script import writing


async def test_a_full_queue_says_how_long_to_wait(server: StandIn, bridge: Bridge) -> None:
    headers = {"Retry-After": "2", "X-Backoff-Ms": "1234"}
    server.on("POST /v1/tasks", s.refuse(429, "ADMISSION_REJECT", "the queue is full", headers))
    for stream in (False, True):
        answer = await bridge.chat(stream=stream)
        assert answer.status == 429
        assert (answer.headers["Retry-After"], answer.headers["retry-after-ms"]) == ("2", "1234")
        assert answer.error == {
            "message": "the queue is full",
            "type": "rate_limit_error",
            "param": None,
            "code": "rate_limit_exceeded",
        }


async def test_one_refusal_of_several_refuses_all(server: StandIn, bridge: Bridge) -> None:
    server.on(
        "POST /v1/tasks", s.accept(), s.refuse(429, "ADMISSION_REJECT", "the queue is full", {"Retry-After": "2"})
    )
    server.on("GET stream", s.stream(s.started(), then="stay"))
    assert (await bridge.chat(n=3)).status == 429


async def test_a_server_that_is_not_ready_says_so(server: StandIn, bridge: Bridge) -> None:
    server.on("POST /v1/tasks", s.refuse(503, "POOL_UNREADY", "it is loading; try again", {"Retry-After": "2"}))
    answer = await bridge.chat()
    assert (answer.status, answer.headers["Retry-After"]) == (503, "2")
    assert (answer.error["type"], answer.error["code"]) == ("server_error", "pool_unready")


async def test_no_server_is_a_503(bridge: Bridge) -> None:
    async with bridging(f"http://127.0.0.1:{free_port()}", TOKEN) as lonely:
        for answer in (await lonely.chat(), await lonely.request("GET", "/v1/models")):
            assert answer.status == 503
            assert "is `orchd serve` running there?" in answer.error["message"]
            assert "Retry-After" in answer.headers


async def test_a_server_with_another_token_is_not_the_clients_fault(server: StandIn) -> None:
    async with bridging(server.url, "another-token-0123456789") as bridge:
        answer = await bridge.chat()
    assert answer.status == 503
    assert "the server refuses this bridge" in answer.error["message"]


@pytest.mark.parametrize(
    ("reason", "error", "status", "code"),
    [
        ("cancelled", {}, 503, "pool_unready"),
        ("error", {"code": "WORKER_RESET", "message": "the step failed", "engine": "llamacpp"}, 500, "worker_reset"),
        ("error", {}, 500, "internal"),
    ],
)
async def test_a_task_that_fails(
    server: StandIn, bridge: Bridge, reason: str, error: dict[str, Any], status: int, code: str
) -> None:
    writing(server, "Hel", reason=reason, error=error or None)
    whole = await bridge.chat()
    assert (whole.status, whole.error["code"], whole.error["type"]) == (status, code, "server_error")
    streamed = await bridge.chat(stream=True)
    *chunks, last = streamed.chunks()
    assert (streamed.status, last) == (200, whole.json())
    assert chunks[-1]["choices"][0]["delta"] == {"content": "Hel"}


async def test_a_stream_that_is_lost_is_taken_up_again(server: StandIn, bridge: Bridge) -> None:
    server.on("POST /v1/tasks", s.accept())
    server.on(
        "GET stream",
        s.stream(s.started(), s.token(1, "Hel"), then="cut"),
        s.stream(s.token(2, "lo"), s.end(3)),
    )
    assert (await bridge.chat()).json()["choices"][0]["message"]["content"] == "Hello"


@pytest.mark.parametrize("stream", [False, True])
async def test_who_leaves_is_not_answered_any_more(server: StandIn, bridge: Bridge, stream: bool) -> None:
    server.on("POST /v1/tasks", s.accept())
    server.on("GET stream", s.stream(s.started(), s.token(1, "Hel"), then="stay"))
    asking = asyncio.create_task(bridge.chat(stream=stream, n=2))
    await until(lambda: len(server.requests("GET stream")) == 2, "both tasks are followed")
    asking.cancel()
    assert await asyncio.to_thread(server.left.wait, 10)


async def test_the_key_is_the_servers_token(bridge: Bridge) -> None:
    for token in (None, "not-the-token-0123456789"):
        answer = await bridge.request("GET", "/v1/models", token=token)
        assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")


async def test_another_host_or_origin_is_refused(server: StandIn, bridge: Bridge) -> None:
    for headers in ({"Host": "evil.example"}, {"Origin": "https://evil.example"}):
        answer = await bridge.request("GET", "/v1/models", headers=headers)
        assert (answer.status, answer.error["code"]) == (403, "forbidden")
    async with bridging(server.url, TOKEN, allowed_hosts=("chat.lan",), allowed_origins=("https://chat.lan",)) as open_:
        headers = {"Host": "chat.lan", "Origin": "https://chat.lan"}
        answer = await open_.request("GET", "/v1/models", headers=headers)
        assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (200, "https://chat.lan")
        assert "retry-after-ms" in answer.headers["Access-Control-Expose-Headers"]


async def test_a_page_may_send_the_headers_that_its_client_has(bridge: Bridge) -> None:
    headers = {
        "Origin": "http://localhost:3000",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
    }
    answer = await bridge.request("OPTIONS", "/v1/chat/completions", token=None, headers=headers)
    assert answer.status == 204
    assert answer.headers["Access-Control-Allow-Headers"] == "authorization,content-type,x-stainless-os"
    assert answer.headers["Access-Control-Allow-Origin"] == "http://localhost:3000"


@pytest.mark.parametrize("path", ["embeddings", "images/generations", "audio/speech", "moderations", "responses"])
async def test_what_openai_has_and_orchd_has_not_is_a_400(bridge: Bridge, path: str) -> None:
    answer = await bridge.request("POST", f"/v1/{path}", model="default")
    assert answer.status == 400
    assert answer.error["message"].startswith(f"/v1/{path} is not available, because orchd only generates text")


async def test_routes_and_methods_that_are_not_there(bridge: Bridge) -> None:
    assert (await bridge.request("GET", "/v1/nothing")).error["code"] == "not_found"
    answer = await bridge.request("GET", "/v1/chat/completions")
    assert (answer.status, answer.headers["Allow"], answer.error["code"]) == (405, "POST", "method_not_allowed")


async def test_what_is_no_http_is_answered_in_the_same_shape(bridge: Bridge) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", bridge.port)
    writer.write(b"nonsense\r\n\r\n")
    answer = await reader.read()
    writer.close()
    assert b"400 Bad Request" in answer
    assert b'{"error":{"message":"the request is not valid HTTP/1.1' in answer
