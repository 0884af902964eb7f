"""Home profile, section 8: error taxonomy of the data plane."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from orchd.errors import Code
from testkit.harness import serving
from testkit.live import Live
from tests.contract.forbidden import words_in

ERRORS: tuple[tuple[int, str, str, bytes | None, dict[str, str]], ...] = (
    (400, "POST", "/v1/tasks", b"{", {}),
    (400, "POST", "/v1/tasks", b'{"prompt": "the", "max_tokens": 100000}', {}),
    (400, "POST", "/v1/pools/default/reload", b'{"new_model_ref": "../up"}', {}),
    (403, "GET", "/health", None, {"Host": "evil.example"}),
    (403, "GET", "/health", None, {"Origin": "https://evil.example"}),
    (404, "GET", "/v1/tasks/x/stream", None, {}),
    (404, "POST", "/v1/pools/x/reload", None, {}),
    (404, "GET", "/", None, {}),
    (405, "DELETE", "/v1/tasks", None, {}),
    (422, "POST", "/v1/pools/default/reload", b'{"new_model_ref": "garbage"}', {}),
    (503, "POST", "/v1/tasks", b'{"prompt": "the", "model_ref": "another"}', {}),
)


@pytest.mark.home("HOME-8.1")
@pytest.mark.parametrize(("status", "method", "path", "body", "headers"), ERRORS)
def test_every_error_is_code_message_engine(
    live: Live, status: int, method: str, path: str, body: bytes | None, headers: dict[str, str]
) -> None:
    answer = live.request(method, path, body, headers=headers)
    assert answer.status == status
    assert answer.headers["content-type"] == "application/json"
    envelope = answer.json()
    assert list(envelope) == ["code", "message", "engine"]
    assert envelope["engine"] == "llamacpp"
    assert Code(envelope["code"])


@pytest.mark.home("HOME-8.1")
async def test_the_error_in_an_end_event_is_the_same_envelope(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path) as server:
        server.brake.hold()
        task_id = await server.submit(max_tokens=4)
        await server.started(1)
        server.brake.fail("a step that fails")
        end = (await server.events(task_id))[-1]
    assert end.data["finish_reason"] == "error"
    assert list(end.data["error"]) == ["code", "message", "engine"]


@pytest.mark.home("HOME-8.2")
async def test_backpressure_says_when_to_come_back(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path, pool={"slots": 1}, queue={"capacity": 1}) as server:
        server.brake.hold()
        await server.submit(max_tokens=4)
        await server.started(1)
        await server.submit(max_tokens=4)
        refusals = [await server.post(prompt="the") for _ in range(4)]
    for refusal in refusals:
        assert refusal.status == 429
        pause_ms = int(refusal.headers["X-Backoff-Ms"])
        assert pause_ms >= 1
        assert int(refusal.headers["Retry-After"]) == max(1, math.ceil(pause_ms / 1000))


@pytest.mark.home("HOME-8.3")
async def test_a_429_has_no_policy_label_in_body_or_headers(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path, pool={"slots": 1}, queue={"capacity": 1}) as server:
        server.brake.hold()
        await server.submit(max_tokens=4)
        await server.started(1)
        await server.submit(max_tokens=4)
        refusal = await server.request(
            "POST", "/v1/tasks", headers={"X-Policy-Label": "gold"}, body=b'{"prompt": "the"}'
        )
    assert refusal.status == 429
    assert set(refusal.json()) == {"code", "message", "engine"}
    said = f"{dict(refusal.headers)} {refusal.body.decode()}"
    assert words_in(said) == set()
    assert "gold" not in said
