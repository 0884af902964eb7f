"""``POST /v1/tasks`` where a queue is full: the pause, the place it leads to, and who is not held up."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.http.envelope import assert_envelope, places
from tests.support.harness import TOKEN, Running, new_id, serving


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


async def test_a_full_queue_rejects_a_large_body_before_it_is_read(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path, pool={"slots": 1}, queue={"capacity": 1}) as server:
        await _fill(server)
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        head = f"POST /v1/tasks HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n"
        writer.write(f"{head}Content-Length: 100000\r\n\r\n".encode())
        assert (await asyncio.wait_for(reader.readline(), 5)).startswith(b"HTTP/1.1 429 ")
        writer.close()


async def test_a_retry_gets_its_first_answer_from_a_full_queue_too(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path, pool={"slots": 1}, queue={"capacity": 1}) as server:
        server.brake.hold()
        await server.submit()
        await server.started(1)
        task_id = new_id()
        first = await server.post(prompt="the", task_id=task_id)
        assert (await server.post(prompt="the")).status == 429
        again = await server.post(prompt="the", task_id=task_id)
        assert (again.status, again.body) == (202, first.body)


async def test_a_full_pool_does_not_close_another(tiny_model_path: Path, other_model: Path) -> None:
    async with serving(tiny_model_path, other_model, pool={"slots": 1}, queue={"capacity": 1}) as server:
        server.brake.hold()
        await server.submit(pool_id="default")
        await server.started(1)
        await server.submit(pool_id="default")
        assert (await server.post(prompt="the", pool_id="default")).status == 429
        assert (await server.post(prompt="the", pool_id="pool1")).status == 202
