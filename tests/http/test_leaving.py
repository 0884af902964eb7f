"""What becomes of a task whose listeners leave, and for how long one that has ended is kept."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

from testkit.harness import serving, until
from tests.http.listening import hear, raw_stream

GRACE = {"cancel_grace_s": 0.3}


async def test_a_running_task_is_cancelled_after_its_listener_left(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path, tasks=GRACE) as server:
        server.brake.hold()
        task_id = await server.submit()
        async with server.listen(task_id) as listener:
            await hear(listener, 1)
            assert await server.busy() == 1

        async def free() -> bool:
            return await server.busy() == 0

        await until(free, "the slot is free")
        started, end = await server.events(task_id)
        assert started.kind == "started"
        assert end.data["finish_reason"] == "cancelled"


async def test_a_waiting_task_is_cancelled_after_its_listener_left(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path, pool={"slots": 1}, tasks=GRACE) as server:
        server.brake.hold()
        await server.submit()
        await server.started(1)
        task_id = await server.submit(priority="batch")
        async with server.listen(task_id):
            assert await server.total("queue_depth") == 1

        async def gone() -> bool:
            return await server.total("queue_depth") == 0

        await until(gone, "the queue is empty")
        (end,) = await server.events(task_id)
        assert end.data.pop("tokens_in") > 0
        assert end.data == {"tokens_cached": 0, "tokens_out": 0, "decode_ms": 0, "finish_reason": "cancelled"}
        assert end.id == 0
        assert await server.total("tasks_enqueued_total", replica_id="", priority="batch") == 1


async def test_a_client_that_vanishes_has_left(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path, tasks=GRACE) as server:
        server.brake.hold()
        task_id = await server.submit()
        reader, writer = await raw_stream(server, task_id)
        await reader.readuntil(b"started")
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # close sends RST
        writer.transport.abort()

        async def free() -> bool:
            return await server.busy() == 0

        await until(free, "the slot is free")


async def test_a_task_nobody_listened_to_runs_to_its_end(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path, tasks={"cancel_grace_s": 0}) as server:
        task_id = await server.submit(max_tokens=32)

        async def done() -> bool:
            return await server.total("tokens_out_total") == 32

        await until(done, "the task is done")
        assert (await server.events(task_id))[-1].data["finish_reason"] == "length"


async def test_coming_back_within_the_grace_saves_the_task(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path, tasks={"cancel_grace_s": 1.0}) as server:
        server.brake.hold()
        task_id = await server.submit(max_tokens=8)
        async with server.listen(task_id) as listener:
            await hear(listener, 1)
        loop = asyncio.get_running_loop()
        async with server.listen(task_id, last=0) as listener:
            back_at = loop.time()
            await until(lambda: loop.time() > back_at + 1.5, "the grace has passed")
            server.brake.release()
            events = [event async for event in listener]
        assert events[-1].data["finish_reason"] == "length"


async def test_one_of_two_listeners_may_leave(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path, tasks={"cancel_grace_s": 0}) as server:
        server.brake.hold()
        task_id = await server.submit(max_tokens=8)
        async with server.listen(task_id) as stays:
            async with server.listen(task_id) as leaves:
                await hear(leaves, 1)
            await _two_sweeps()
            server.brake.release()
            events = [event async for event in stays]
        assert events[-1].data["finish_reason"] == "length"


async def _two_sweeps() -> None:
    loop = asyncio.get_running_loop()
    began = loop.time()
    await until(lambda: loop.time() > began + 0.6, "two sweeps")


# --- how long it is kept ---------------------------------------------------------------------------------------------


async def test_a_task_is_forgotten_after_its_retention(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path, tasks={"retention_s": 0.5}) as server:
        task_id = await server.submit(max_tokens=4)
        assert (await server.events(task_id))[-1].kind == "end"

        async def gone() -> bool:
            return (await server.request("GET", f"/v1/tasks/{task_id}/stream")).status == 404

        await until(gone, "the task is forgotten")
        assert (await server.post(task_id=task_id, prompt="other")).status == 202


async def test_the_tasks_that_ended_first_are_forgotten_for_their_bytes(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path, tasks={"retained_bytes": 12_000}) as server:
        tasks = []
        for _ in range(8):
            tasks.append(await server.submit(max_tokens=16))
            await server.events(tasks[-1])
        status = [(await server.request("GET", f"/v1/tasks/{task}/stream")).status for task in tasks]
    kept = status.count(200)
    assert 2 <= kept <= 6
    assert status == [404] * (len(tasks) - kept) + [200] * kept


async def test_a_listener_outlives_the_retention(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path, tasks={"retention_s": 0, "retained_bytes": 0}) as server:
        server.brake.hold()
        task_id = await server.submit(max_tokens=8)
        async with server.listen(task_id) as listener:
            await hear(listener, 1)
            server.brake.release()
            assert [event async for event in listener][-1].kind == "end"
