"""Service, pools and worker threads on fake models: what clients see when replicas fail, stall and come back."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from engines.errors import DecodeFailed, LoadFailed
from orchd.errors import AdmissionReject, PoolUnavailable
from orchd.pools.recovery import MAX_RECOVERY_PAUSE_S
from orchd.schemas import Priority
from testkit.builders import pause_of
from testkit.fake_engine import Hang
from testkit.stage import make_stage

BROKEN = DecodeFailed("broken")


async def test_a_failed_step_ends_its_tasks_and_the_next_one_is_served(tiny_model_path: Path) -> None:
    async with make_stage(tiny_model_path) as stage:
        stage.model().step_faults.append(BROKEN)
        tasks = [await stage.submit(), await stage.submit()]
        assert [await stage.end_of(task) for task in tasks] == ["WORKER_RESET", "length"]
        assert stage.service.health().status == "ok"
        await stage.check()


async def test_waiting_tasks_move_to_the_replica_that_is_left_and_health_says_degraded(tiny_model_path: Path) -> None:
    async with make_stage(tiny_model_path, replicas=2, gated=True) as stage:
        stage.model(0).always = BROKEN
        tasks = [await stage.submit() for _ in range(10)]
        stage.model(0).allow(3)
        await stage.pauses.begun()  # it is being brought back
        stage.model(1).allow(100)
        assert await stage.ends_of(tasks) == {"WORKER_RESET": 3, "length": 7}
        health = stage.service.health()
        assert health.status == "degraded"
        assert [replica.alive for replica in health.pools[0].replicas] == [False, True]
        assert health.pools[0].ready
        later = await stage.submit()
        assert await stage.end_of(later) == "length"
        await stage.check()


async def test_with_no_replica_left_waiting_tasks_end_and_new_ones_get_503(tiny_model_path: Path) -> None:
    async with make_stage(tiny_model_path, gated=True) as stage:
        stage.model().always = BROKEN
        tasks = [await stage.submit() for _ in range(8)]
        stage.model().allow(100)
        assert await stage.ends_of(tasks) == {"WORKER_RESET": 3, "POOL_UNAVAILABLE": 5}
        assert not any(b"event: started" in frame for task in tasks[3:] for frame in task.log.frames)
        with pytest.raises(PoolUnavailable) as refusal:
            await stage.submit()
        assert pause_of(refusal.value) >= 1
        health = stage.service.health()
        assert (health.status, health.pools[0].ready) == ("degraded", False)
        await stage.check()


async def test_a_lost_replica_comes_back_after_doubling_pauses_and_serves(tiny_model_path: Path) -> None:
    faults = tuple(LoadFailed("not yet") for _ in range(8))
    async with make_stage(tiny_model_path, load_faults=faults) as stage:
        stage.model().always = BROKEN
        for _ in range(3):
            await stage.end_of(await stage.submit())
        for _ in range(9):
            await stage.pauses.begun()
            stage.pauses.end()
        await stage.until(lambda: stage.pool.ready)
        assert stage.pauses.seconds == [1, 2, 4, 8, 16, 32, MAX_RECOVERY_PAUSE_S, MAX_RECOVERY_PAUSE_S, 60]
        assert await stage.end_of(await stage.submit(max_tokens=3)) == "length"
        assert stage.service.health().status == "ok"
        await stage.check()


async def test_a_replica_that_fails_again_and_again_is_given_longer_and_longer_pauses(tiny_model_path: Path) -> None:
    async with make_stage(tiny_model_path, breaks=BROKEN) as stage:
        for _ in range(4):
            for _ in range(3):
                assert await stage.end_of(await stage.submit()) == "WORKER_RESET"
            await stage.pauses.begun()
            stage.pauses.end()
            await stage.until(lambda: stage.pool.ready)
        assert stage.pauses.seconds == [1, 2, 4, 8]
        await stage.check()


async def test_a_task_that_ends_well_makes_the_pauses_short_again(tiny_model_path: Path) -> None:
    async with make_stage(tiny_model_path) as stage:
        for _ in range(3):
            stage.engine.models[-1].always = BROKEN
            for _ in range(3):
                await stage.end_of(await stage.submit())
            await stage.pauses.begun()
            stage.pauses.end()
            await stage.until(lambda: stage.pool.ready)
            assert await stage.end_of(await stage.submit()) == "length"
        assert stage.pauses.seconds == [1, 1, 1]
        await stage.check()


async def test_one_lost_pool_leaves_the_other_on_the_same_device_alone(tiny_model_path: Path) -> None:
    async with make_stage(tiny_model_path, pools=("default", "other"), slots=2) as stage:
        hang = Hang()
        stage.model(0).step_faults.append(hang)
        stage.model(0).always = BROKEN
        lost = [await stage.submit()]
        await stage.until(hang.began.is_set)  # alone, so that the others take three steps, which all fail
        lost += [await stage.submit() for _ in range(5)]
        fine = [await stage.submit(pool="other", max_tokens=20) for _ in range(6)]
        hang.release.set()
        assert await stage.ends_of(fine) == {"length": 6}
        await stage.ends_of(lost)
        health = stage.service.health()
        assert [pool.ready for pool in health.pools] == [False, True]
        await stage.check()


async def test_a_worker_that_hangs_shows_in_health_after_the_time_and_not_before(tiny_model_path: Path) -> None:
    async with make_stage(tiny_model_path, replicas=2) as stage:
        hang = Hang()
        stage.model(0).step_faults.append(hang)
        task = await stage.submit()
        await stage.until(hang.began.is_set)
        stage.clock.seconds = 59
        assert stage.service.health().status == "ok"
        stage.clock.seconds = 61
        health = stage.service.health()
        assert health.status == "degraded"
        assert [replica.alive for replica in health.pools[0].replicas] == [False, True]
        assert health.pools[0].ready
        hang.release.set()
        assert await stage.end_of(task) == "length"
        await stage.until(lambda: stage.service.health().status == "ok")
        await stage.check()


async def test_tasks_of_a_worker_that_hangs_end_and_what_was_placed_there_moves(tiny_model_path: Path) -> None:
    async with make_stage(tiny_model_path, replicas=2, slots=2) as stage:
        hang = Hang()
        stage.model(0).step_faults.append(hang)
        hanging = await stage.submit()
        await stage.until(hang.began.is_set)
        stage.clock.seconds = 30  # the other worker begins its step later
        stage.model(1).gated = True
        others = [await stage.submit() for _ in range(3)]  # one is placed beside the task that hangs
        stage.clock.seconds = 61
        stage.service.sweep()
        assert await stage.end_of(hanging) == "DECODE_TIMEOUT"
        stage.model(1).allow(100)
        assert await stage.ends_of(others) == {"length": 3}
        hang.release.set()
        await stage.until(lambda: stage.service.health().status == "ok")
        assert await stage.end_of(await stage.submit()) == "length"
        await stage.check()


async def test_with_only_a_hanging_replica_the_pool_is_unavailable(tiny_model_path: Path) -> None:
    async with make_stage(tiny_model_path) as stage:
        hang = Hang()
        stage.model().step_faults.append(hang)
        tasks = [await stage.submit()]
        await stage.until(hang.began.is_set)
        tasks.append(await stage.submit())
        stage.clock.seconds = 61
        stage.service.sweep()
        assert await stage.ends_of(tasks) == {"DECODE_TIMEOUT": 1, "POOL_UNAVAILABLE": 1}
        with pytest.raises(PoolUnavailable):
            await stage.submit()
        hang.release.set()
        await stage.until(lambda: stage.pool.scheduler.any_ready)
        assert await stage.end_of(await stage.submit()) == "length"
        await stage.check()


async def test_a_pool_that_shares_a_hanging_worker_and_runs_nothing_there_strands_no_task(
    tiny_model_path: Path,
) -> None:
    async with make_stage(tiny_model_path, pools=("default", "other")) as stage:
        hang = Hang()
        stage.model(0).step_faults.append(hang)
        await stage.submit()
        await stage.until(hang.began.is_set)
        waiting = [await stage.submit(pool="other") for _ in range(2)]
        stage.clock.seconds = 61
        stage.service.sweep()
        assert await stage.ends_of(waiting) == {"POOL_UNAVAILABLE": 2}
        with pytest.raises(PoolUnavailable):
            await stage.submit(pool="other")
        hang.release.set()
        await stage.until(lambda: stage.service.pools["other"].scheduler.any_ready)
        assert await stage.end_of(await stage.submit(pool="other")) == "length"
        await stage.check()


async def test_where_one_of_two_workers_hangs_in_another_pool_both_tasks_start_on_the_idle_replica(
    tiny_model_path: Path,
) -> None:
    async with make_stage(tiny_model_path, replicas=2, pools=("default", "other")) as stage:
        hang = Hang()
        stage.model(0).step_faults.append(hang)
        await stage.submit()
        await stage.until(hang.began.is_set)
        tasks = [await stage.submit(pool="other") for _ in range(2)]  # the first is for the worker that hangs
        stage.clock.seconds = 61
        stage.service.sweep()
        assert await stage.ends_of(tasks) == {"length": 2}
        hang.release.set()
        await stage.check()


async def test_a_worker_that_hung_outside_a_step_and_has_nothing_to_do_gets_tasks_again(tiny_model_path: Path) -> None:
    async with make_stage(tiny_model_path) as stage:
        began, release = threading.Event(), threading.Event()

        def hang() -> None:
            began.set()
            release.wait(20)

        stage.workers[0].do(hang)
        await stage.until(began.is_set)
        stage.clock.seconds = 61
        stage.service.sweep()
        assert not stage.pool.scheduler.any_ready
        release.set()
        await stage.until(lambda: not stage.workers[0].stalled_s())
        stage.service.sweep()
        await stage.until(lambda: stage.pool.scheduler.any_ready)
        assert await stage.end_of(await stage.submit()) == "length"


async def test_a_refusal_of_a_full_queue_is_counted_and_takes_nothing(tiny_model_path: Path) -> None:
    async with make_stage(tiny_model_path, capacity=2, gated=True) as stage:
        tasks = [await stage.submit() for _ in range(3)]
        for _ in range(5):
            with pytest.raises(AdmissionReject) as refusal:
                await stage.submit()
            stage.service.note_refusal(refusal.value)
        assert stage.service.rejected == {"ADMISSION_REJECT": 5}
        stage.model().allow(100)
        assert await stage.ends_of(tasks) == {"length": 3}
        await stage.check()


async def test_ends_equal_accepted_tasks_through_a_day_of_faults(tiny_model_path: Path) -> None:
    async with make_stage(tiny_model_path, replicas=2, slots=2, capacity=6, pools=("default", "other")) as stage:

        async def mend() -> None:
            while True:
                await stage.pauses.begun()
                stage.pauses.end()

        mending = asyncio.create_task(mend())
        refused = 0
        for number in range(300):
            model = stage.engine.models[number % len(stage.engine.models)]
            if number % 11 == 0:
                model.step_faults.extend([BROKEN] * (number % 4))
            pool = ("default", "other")[number % 2]
            try:
                task = await stage.submit(priority=list(Priority)[number % 3 % 2], max_tokens=1 + number % 7, pool=pool)
            except (AdmissionReject, PoolUnavailable):
                refused += 1
            else:
                if number % 5 == 0:
                    stage.service.cancel(task)
            if number % 3 == 0:
                await asyncio.sleep(0.001)
        await stage.check()
        mending.cancel()
        assert refused < 290
