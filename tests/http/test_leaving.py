"""What becomes of a task whose listeners leave, and for how long one that has ended is kept."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from orchd.client import Client
from testkit.harness import TOKEN, Running, serving, until
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


# --- at once ---------------------------------------------------------------------------------------------------------

HALF_AN_HOUR = {"cancel_grace_s": 1800}
"""Nothing ends by itself meanwhile."""


async def test_a_stream_that_grants_no_time_frees_its_slot_at_once(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path, tasks=HALF_AN_HOUR) as server:
        server.brake.hold()
        task_id = await server.submit()
        async with server.listen(task_id, path="?cancel_grace_s=0") as listener:
            await hear(listener, 1)
        await until(lambda: _free(server), "the slot is free")
        assert (await server.events(task_id))[-1].data["finish_reason"] == "cancelled"


async def test_who_opens_such_a_stream_beside_another_cancels_by_leaving_last(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path, tasks=HALF_AN_HOUR) as server:
        server.brake.hold()
        task_id = await server.submit()
        async with server.listen(task_id):
            async with server.listen(task_id, path="?cancel_grace_s=0"):
                pass
            await _two_sweeps()
            assert await server.busy() == 1  # the other one still listens
        async with server.listen(task_id, path="?cancel_grace_s=0"):
            pass
        await until(lambda: _free(server), "the slot is free")


@pytest.mark.parametrize("asked", ["", "-1", "nan", "inf", "soon"])
async def test_a_grace_that_is_none_is_refused(asked: str, tiny_model_path: Path) -> None:
    async with serving(tiny_model_path) as server:
        task_id = await server.submit()
        answer = await server.request("GET", f"/v1/tasks/{task_id}/stream?cancel_grace_s={asked}")
    assert (answer.status, answer.json()["code"]) == (400, "INVALID_PARAMS")
    assert answer.json()["message"] == "cancel_grace_s: expected a number of seconds, from 0 on"


@pytest.mark.parametrize("running", [True, False])
async def test_closing_the_clients_iterator_cancels_at_once(running: bool, tiny_model_path: Path) -> None:
    async with serving(tiny_model_path, pool={"slots": 1}, tasks=HALF_AN_HOUR) as server:
        server.brake.hold()
        if not running:
            await server.submit()
            await server.started(1)
        async with Client(server.url, token=TOKEN) as client:
            follower = asyncio.create_task(_read(client, task_id := await server.submit()))
            if running:
                await server.started(1)
            await asyncio.sleep(0)  # it asks for the stream
            follower.cancel()
            await asyncio.wait([follower])

        async def gone() -> bool:
            busy, waiting = await server.busy(), await server.total("queue_depth")
            return (busy, waiting) == (0 if running else 1, 0)

        await until(gone, "the task is gone")
        assert (await server.events(task_id))[-1].data["finish_reason"] == "cancelled"


async def test_a_submit_that_is_given_up_leaves_no_task_behind(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path, tasks=HALF_AN_HOUR) as server:
        server.brake.hold()
        async with Client(server.url, token=TOKEN) as client:
            given_up = 0
            for pause_s in (0, 0.0005, 0.001, 0.002):
                submitting = asyncio.create_task(client.submit(prompt="the", max_tokens=400))
                await asyncio.wait([submitting], timeout=pause_s)
                if submitting.cancel():
                    await asyncio.wait([submitting])
                    given_up += 1
        assert given_up
        left = 4 - given_up

        async def gone() -> bool:
            return await server.busy() + await server.total("queue_depth") == left

        await until(gone, "what was given up is gone")


async def _free(server: Running) -> bool:
    return await server.busy() == 0


async def _read(client: Client, task_id: str) -> None:
    async for _ in client.follow(task_id):
        pass


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
