"""``GET /health``: what it says, and that it says so at once whatever the workers do."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

from testkit.brake import Brake
from testkit.harness import Running, serving, until
from tests.http.envelope import assert_envelope

AT_ONCE_S = 0.5
"""Milliseconds, on two cores that others use as well; what it is compared with takes seconds."""


async def _health(server: Running) -> tuple[int, Any]:
    answer = await server.request("GET", "/health")
    return answer.status, answer.json()


async def _slowest_s(server: Running, times: int = 20) -> float:
    slowest = 0.0
    for _ in range(times):
        began = time.monotonic()
        await server.request("GET", "/health")
        slowest = max(slowest, time.monotonic() - began)
    return slowest


async def test_ready(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path, tiny_model_path) as server:
        answer = await server.request("GET", "/health")
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.json() == {
        "status": "ok",
        "pools": [
            {
                "id": pool,
                "model_id": "tiny-llama",
                "ctx": 512,
                "ready": True,
                "replicas": [{"id": "0", "device": device, "alive": True, "slots": 2, "busy": 0}],
            }
            for pool, device in (("default", "cpu#0.0"), ("pool1", "cpu#1.0"))
        ],
    }


async def test_loading_then_ok(tiny_model_path: Path) -> None:
    brake = Brake()
    brake.may_load.clear()
    async with serving(tiny_model_path, brake=brake, ready=False) as server:
        status, body = await _health(server)
        assert (status, body["status"]) == (503, "loading")
        (pool,) = body["pools"]
        assert (pool["id"], pool["model_id"], pool["ready"]) == ("default", None, False)
        assert pool["replicas"][0]["alive"] is False
        assert await _slowest_s(server) < AT_ONCE_S
        brake.release()

        async def ok() -> bool:
            status, body = await _health(server)
            return (status, body["status"]) == (200, "ok")

        await until(ok, "the pool is ready")


async def test_one_pool_that_cannot_start_tasks_is_enough_for_503(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path, tiny_model_path, workers={"stall_s": 0.2}) as server:
        server.brake.block()
        await server.submit(pool_id="pool1")

        async def seen() -> bool:
            status, body = await _health(server)
            return (status, [pool["ready"] for pool in body["pools"]]) == (503, [True, False])

        await until(seen, "the stall is seen")


async def test_while_it_loads_a_task_is_refused_for_now(tiny_model_path: Path) -> None:
    brake = Brake()
    brake.may_load.clear()
    async with serving(tiny_model_path, brake=brake, ready=False) as server:
        answer = await server.post(prompt="the")
        assert_envelope(answer, 503, "POOL_UNREADY")
        assert int(answer.headers["Retry-After"]) >= 1
        assert "X-Backoff-Ms" not in answer.headers
        assert await server.total("tasks_rejected_total", reason="POOL_UNREADY") == 1
        assert await server.total("queue_depth") == 0


async def test_busy_counts_slots(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path) as server:
        server.brake.hold()
        for busy in (1, 2, 2):
            await server.submit()
            await server.started(busy)
            assert await server.busy() == busy


async def test_it_answers_at_once_while_a_worker_hangs_in_a_step(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path) as server:
        server.brake.block()
        await server.submit()
        await server.started(1)
        assert await _slowest_s(server) < AT_ONCE_S
        assert (await _health(server))[0] == 200


async def test_it_answers_at_once_while_a_long_prompt_is_tokenised(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path) as server:
        submit = asyncio.create_task(server.post(prompt="the river is " * 70_000))
        slowest_s = 0.0
        while not submit.done():
            slowest_s = max(slowest_s, await _slowest_s(server, 1))
        assert_envelope(await submit, 400, "INVALID_PARAMS")
    assert slowest_s < AT_ONCE_S


async def test_a_worker_that_hangs_is_not_alive(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path, workers={"stall_s": 0.2}) as server:
        server.brake.block()
        await server.submit()

        async def seen(status: int, word: str, alive: bool) -> bool:
            answer, body = await _health(server)
            replica = body["pools"][0]["replicas"][0]
            return (answer, body["status"], replica["alive"]) == (status, word, alive)

        await until(lambda: seen(503, "degraded", False), "the stall is seen")
        server.brake.release()
        await until(lambda: seen(200, "ok", True), "the worker is alive again")


async def test_a_pool_with_one_replica_left_is_degraded_and_serves(tiny_model_path: Path) -> None:
    pool = {"devices": ["cpu", "cpu"], "slots": 1}
    async with serving(tiny_model_path, pool=pool, workers={"stall_s": 0.2}) as server:
        server.brake.block()
        await server.submit()

        async def degraded() -> bool:
            status, body = await _health(server)
            alive = sorted(replica["alive"] for replica in body["pools"][0]["replicas"])
            return (status, body["status"], alive) == (200, "degraded", [False, True])

        await until(degraded, "the stall is seen")
        server.brake.release()
        assert (await server.run(max_tokens=4))[-1].data["finish_reason"] == "length"
