"""Home profile, section 5: HTTP APIs."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import pytest

from orchd.service import Service
from testkit.harness import Brake, serving, until
from testkit.live import Answer, Live
from tests.contract.forbidden import CDC, METHODS, words_in

SAMPLES: tuple[tuple[str, str, bytes | None], ...] = (
    ("POST", "/v1/tasks", b'{"prompt": "the", "max_tokens": 1}'),
    ("POST", "/v1/tasks", b'{"prompt": ""}'),
    ("POST", "/v1/tasks", b'{"prompt": "the", "model_ref": "another"}'),
    ("GET", "/v1/tasks/x/stream", None),
    ("POST", "/v1/pools/x/reload", None),
    ("POST", "/v1/pools/default/reload", b'{"new_model_ref": "absent"}'),
    ("POST", "/v1/pools/default/reload", b'{"new_model_ref": "garbage"}'),
    ("GET", "/health", None),
    ("GET", "/metrics", None),
    ("GET", "/nowhere", None),
    ("PUT", "/health", None),
)
"""A request for many kinds of answers."""

IDS = {
    "X-Correlation-Id": "c0ffee00-0000-4000-8000-000000000001",
    "X-Request-Id": "c0ffee00-0000-4000-8000-000000000002",
    "Traceparent": "00-c0ffee00000040008000000000000003-c0ffee0000000004-01",
    "X-B3-Traceid": "c0ffee0000004000",
    "Baggage": "id=c0ffee05",
}
"""What a caller may hope to find again."""


def ask(live: Live, sample: tuple[str, str, bytes | None], **headers: str) -> Answer:
    method, path, body = sample
    return live.request(method, path, body, headers={name.replace("_", "-"): value for name, value in headers.items()})


@pytest.mark.home("HOME-5.1")
def test_a_task_is_accepted_with_202(live: Live) -> None:
    answer = live.post(prompt="the", max_tokens=1)
    assert answer.status == 202
    assert uuid.UUID(answer.json()["task_id"])


@pytest.mark.home("HOME-5.1")
@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"{}", b'{"prompt": 1}', b'{"prompt": "a", "nonsense": 1}'])
def test_a_wrong_request_is_400(live: Live, body: bytes) -> None:
    answer = live.request("POST", "/v1/tasks", body)
    assert (answer.status, answer.json()["code"]) == (400, "INVALID_PARAMS")


@pytest.mark.home("HOME-5.1", "HOME-5.8")
def test_a_full_queue_is_429_and_its_body_has_no_policy_label(live: Live) -> None:
    ids, refusal = live.until_full(max_tokens=300, ignore_eos=True)
    for task_id in ids:
        live.follow(task_id)
    assert (refusal.status, refusal.json()["code"]) == (429, "ADMISSION_REJECT")
    assert set(refusal.json()) == {"code", "message", "engine"}
    assert words_in(refusal.body.decode()) == set()


@pytest.mark.home("HOME-5.1")
async def test_a_defect_is_500(tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(self: Service, request: Any) -> None:
        raise ZeroDivisionError("secret detail")

    async with serving(tiny_model_path) as server:
        monkeypatch.setattr(Service, "submit", fail)
        answer = await server.post(prompt="the")
    assert (answer.status, answer.json()["code"]) == (500, "INTERNAL")
    assert b"secret" not in answer.body


@pytest.mark.home("HOME-5.1")
async def test_a_pool_that_is_not_there_yet_is_503(tiny_model_path: Path) -> None:
    brake = Brake()
    brake.may_load.clear()
    async with serving(tiny_model_path, brake=brake, ready=False) as server:
        answer = await server.post(prompt="the")
    assert (answer.status, answer.json()["code"]) == (503, "POOL_UNREADY")


@pytest.mark.home("HOME-5.1")
def test_a_model_that_no_pool_has_is_503(live: Live) -> None:
    answer = live.post(model_ref="another-model")
    assert (answer.status, answer.json()["code"]) == (503, "POOL_UNAVAILABLE")


@pytest.mark.home("HOME-5.2")
@pytest.mark.parametrize(
    "fields", [{"max_tokens": 1}, {"max_tokens": 24}, {"messages": [{"role": "user", "content": "a"}]}]
)
def test_a_stream_is_started_then_tokens_then_end(live: Live, fields: dict[str, Any]) -> None:
    events = live.follow(live.submit(**{"max_tokens": 8, **fields}))
    kinds = [kind for kind, _ in events]
    assert kinds[0] == "started"
    assert kinds[-1] == "end"
    assert set(kinds[1:-1]) == {"token"}


@pytest.mark.home("HOME-5.3")
async def test_a_pool_can_be_reloaded(models_folder: Path) -> None:
    async with serving(models_folder / "tiny-a.gguf") as server:
        for body, model in ((b"", "tiny-a"), (b'{"new_model_ref": "tiny-b"}', "tiny-b")):
            answer = await server.request("POST", "/v1/pools/default/reload", body=body)
            assert (answer.status, answer.json()) == (200, {"pool_id": "default", "model_id": model})
            health = (await server.request("GET", "/health")).json()
            assert [pool["model_id"] for pool in health["pools"]] == [model]


@pytest.mark.home("HOME-5.4")
def test_health_is_200_when_every_pool_can_start_tasks(live: Live) -> None:
    answer = live.request("GET", "/health")
    assert (answer.status, answer.json()["status"]) == (200, "ok")


@pytest.mark.home("HOME-5.4")
async def test_health_is_503_until_then(tiny_model_path: Path) -> None:
    brake = Brake()
    brake.may_load.clear()
    async with serving(tiny_model_path, brake=brake, ready=False) as server:
        answer = await server.request("GET", "/health")
        assert (answer.status, answer.json()["status"]) == (503, "loading")
        brake.release()

        async def well() -> bool:
            return (await server.request("GET", "/health")).status == 200

        await until(well, "the pool is ready")


@pytest.mark.home("HOME-5.5")
@pytest.mark.parametrize("path", CDC)
def test_there_is_no_cdc_harness(live: Live, path: str) -> None:
    assert {live.request(method, path).status for method in METHODS} == {404}


@pytest.mark.home("HOME-5.6")
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: f"{sample[0]} {sample[1]} {len(sample[2] or b'')}")
def test_no_answer_carries_a_correlation_id(live: Live, sample: tuple[str, str, bytes | None]) -> None:
    plain, tagged = ask(live, sample), ask(live, sample, **IDS)
    assert tagged.headers.keys() == plain.headers.keys()
    said = f"{tagged.headers} {tagged.body.decode()}".lower()
    assert not [name for name in tagged.headers if "id" in name.split("-") or name.startswith(("trace", "x-b3"))]
    assert "c0ffee" not in said
    assert words_in(said) == set()


@pytest.mark.home("HOME-5.6")
def test_no_event_carries_a_correlation_id(live: Live) -> None:
    body = json.dumps({"prompt": "the", "max_tokens": 4}).encode()
    task_id = live.request("POST", "/v1/tasks", body, headers=IDS).json()["task_id"]
    answer = live.request("GET", f"/v1/tasks/{task_id}/stream", headers=IDS)
    said = f"{answer.headers} {answer.body.decode()}"
    assert "c0ffee" not in said
    assert task_id not in said
    assert {key for _, data in live.follow(task_id) for key in data} <= {
        *(
            "queue_position",
            "predicted_start_ms",
            "t",
            "r",
            "i",
            "tokens_in",
            "tokens_cached",
            "tokens_out",
            "decode_ms",
            "finish_reason",
        ),
    }


@pytest.mark.home("HOME-5.7")
def test_answers_are_minimal(live: Live) -> None:
    accepted = live.post(max_tokens=1)
    assert set(accepted.json()) == {"task_id", "queue_position", "predicted_start_ms", "backoff_ms"}
    health = live.request("GET", "/health").json()
    assert set(health) == {"status", "pools"}
    assert set(health["pools"][0]) == {"id", "model_id", "ctx", "ready", "replicas"}
    assert set(health["pools"][0]["replicas"][0]) == {"id", "device", "alive", "slots", "busy"}
    assert len(accepted.body) < 200


@pytest.mark.home("HOME-5.7")
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: f"{sample[0]} {sample[1]} {len(sample[2] or b'')}")
def test_headers_are_minimal(live: Live, sample: tuple[str, str, bytes | None]) -> None:
    asked = {"retry-after", "allow"}  # what some of them say on purpose
    assert ask(live, sample).headers.keys() - asked <= {
        "content-type",
        "content-length",
        "date",
        "server",
        "connection",
    }
