"""``POST /v1/tasks`` where a queue is full: the pause, the place it leads to, and who is not held up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import msgspec
import pytest

from testkit.harness import TOKEN, Running, new_id, serving
from tests.http.envelope import assert_envelope, places


async def _fill(server: Running) -> None:
    """One task on the only slot, one in the only place."""
    server.brake.hold()
    await server.submit()
    await server.started(1)
    await server.submit()


async def test_a_full_queue_rejects_with_the_pause_to_make(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path, pool={"slots": 1}, queue={"capacity": 1}) as server:
        await _fill(server)
        before = await places(server)
        answer = await server.post(prompt="the")
        assert_envelope(answer, 429, "ADMISSION_REJECT")
        assert await places(server) == before
        assert await server.total("tasks_rejected_total", reason="ADMISSION_REJECT") == 1
    assert "policy_label" not in answer.json()
    retry_after, backoff_ms = answer.headers["Retry-After"], int(answer.headers["X-Backoff-Ms"])
    assert retry_after.isdigit()
    assert int(retry_after) == max(1, -(-backoff_ms // 1000))
    assert backoff_ms >= 1


async def test_the_pause_leads_to_a_place(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path, pool={"slots": 1}, queue={"capacity": 1}) as server:
        await server.run()  # a service time is known now
        await _fill(server)
        pause_s = int((await server.post(prompt="the")).headers["X-Backoff-Ms"]) / 1000
        server.brake.release()
        await asyncio.sleep(pause_s)
        assert (await server.post(prompt="the")).status == 202


@pytest.mark.parametrize("chars", [3, 100_000])
@pytest.mark.parametrize("chunked", [False, True])
async def test_a_retry_gets_its_first_answer_from_a_full_queue_too(
    tiny_model_path: Path, chars: int, chunked: bool
) -> None:
    async with serving(tiny_model_path, pool={"slots": 1, "ctx": 200_000}, queue={"capacity": 1}) as server:
        server.brake.hold()
        await server.submit()
        await server.started(1)
        body = msgspec.json.encode({"prompt": "t" * chars, "task_id": new_id(), "max_tokens": 8})
        url = f"http://127.0.0.1:{server.port}/v1/tasks"
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}

        async def pieces() -> AsyncIterator[bytes]:
            for start in range(0, len(body), 10_000):
                yield body[start : start + 10_000]

        async with aiohttp.ClientSession(headers=headers) as session:
            async with session.post(url, data=body) as response:
                first = await response.read()
                assert response.status == 202
            assert (await server.post(prompt="the")).status == 429
            async with session.post(url, data=pieces() if chunked else body) as response:
                assert (response.status, await response.read()) == (202, first)


async def test_each_of_several_full_pools_tells_its_own_pause_to_a_large_body_too(
    tiny_model_path: Path, other_model: Path
) -> None:
    async with serving(tiny_model_path, other_model, pool={"slots": 1}, queue={"capacity": 1}) as server:
        server.brake.hold()
        for number, (pool_id, max_tokens) in enumerate((("default", 1), ("pool1", 100)), 1):
            await server.submit(pool_id=pool_id, max_tokens=max_tokens)
            await server.started(number)
            await server.submit(pool_id=pool_id, max_tokens=max_tokens)
        pauses = {
            (pool_id, size): int((await server.post(prompt="t" * size, pool_id=pool_id)).headers["X-Backoff-Ms"])
            for pool_id in ("default", "pool1")
            for size in (3, 100_000)
        }
    assert min(pauses["pool1", 3], pauses["pool1", 100_000]) > 3 * pauses["default", 3]


async def test_a_full_pool_does_not_close_another(tiny_model_path: Path, other_model: Path) -> None:
    async with serving(tiny_model_path, other_model, pool={"slots": 1}, queue={"capacity": 1}) as server:
        server.brake.hold()
        await server.submit(pool_id="default")
        await server.started(1)
        await server.submit(pool_id="default")
        assert (await server.post(prompt="the", pool_id="default")).status == 429
        assert (await server.post(prompt="the", pool_id="pool1")).status == 202
