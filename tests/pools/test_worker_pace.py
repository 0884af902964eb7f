"""What a worker tells each model of the others on its device, and what counts as a sign of life."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest

from engines.api import ALONE, Beside, DeviceSpec, StepEvent
from orchd.machine.devices import Device
from orchd.process import listen
from orchd.server import Server
from orchd.settings.config import Config, WorkersConfig
from orchd.settings.credentials import Credentials
from testkit.fake_engine import FakeEngine, FakeModel
from testkit.observers import WhenReady
from tests.pools.rig import Rig, make_rig


def slow(rig: Rig, pool: int, seconds: float) -> FakeModel:
    """Let each step of a pool's model take so long."""
    model = rig.pools[pool].models[0]
    step: Callable[[Beside], list[StepEvent]] = model.step

    def slowly(beside: Beside = ALONE) -> list[StepEvent]:
        rig.clock.now += seconds
        return step(beside)

    model.step = slowly  # type: ignore[method-assign]  # the same, later
    return model


def test_a_model_that_is_alone_on_its_device_is_told_so() -> None:
    rig = make_rig(pools=2)
    rig.submit(max_tokens=3)
    rig.rounds(3)
    assert rig.pools[0].models[0].beside == [ALONE] * 3


def test_a_prompt_is_told_of_the_streams_of_another_pool_and_of_the_time_they_take() -> None:
    rig = make_rig(pools=2)
    slow(rig, 0, 0.03)
    rig.submit(pool=0, max_tokens=20)
    rig.submit(pool=0, max_tokens=20)
    rig.rounds(2)
    rig.submit(pool=1)
    rig.rounds(1)
    (beside,) = rig.pools[1].models[0].beside
    assert (beside.streams, beside.prompts) == (2, 0)
    assert abs(beside.streams_s - 0.03) < 1e-9


def test_streams_are_told_of_a_prompt_in_another_pool_and_two_prompts_of_each_other() -> None:
    rig = make_rig(pools=3)
    rig.submit(pool=0, max_tokens=20)
    rig.rounds(1)
    rig.submit(pool=1, max_tokens=20)
    rig.submit(pool=2, max_tokens=20)
    rig.rounds(1)
    assert [pool.models[0].beside[-1] for pool in rig.pools] == [
        Beside(prompts=2),
        Beside(streams=1, prompts=1),
        Beside(streams=2),  # the second pool's prompt was done when it was the third one's turn
    ]


def test_a_step_with_a_prompt_does_not_count_as_what_streams_take() -> None:
    rig = make_rig(pools=2)
    slow(rig, 1, 0.5)
    rig.submit(pool=0, max_tokens=20)
    rig.submit(pool=1, max_tokens=20)
    rig.rounds(3)
    assert rig.pools[0].models[0].beside == [
        Beside(prompts=1),
        Beside(streams=1),
        Beside(streams=1, streams_s=0.5),
    ]


def test_an_old_model_that_lets_its_tasks_finish_counts_as_another_one() -> None:
    rig = make_rig()
    old = rig.pools[0].models[0]
    rig.submit(max_tokens=20)
    rig.rounds(1)
    new = rig.replace(0, 0)
    rig.submit(max_tokens=20)
    rig.rounds(1)
    assert old.beside == [ALONE, Beside(prompts=1)]
    assert new.beside == [Beside(streams=1)]


def test_a_task_is_cancelled_before_the_next_model_steps() -> None:
    rig = make_rig(pools=2)
    first, second = rig.submit(pool=0, max_tokens=20), rig.submit(pool=1, max_tokens=20)
    rig.rounds(1)
    model = rig.pools[0].models[0]
    step = model.step

    def step_and_cancel(beside: Beside = ALONE) -> list[StepEvent]:
        rig.cancel(second)  # while the first pool's model is in its step
        return step(beside)

    model.step = step_and_cancel  # type: ignore[method-assign]  # the same, and more
    steps = len(rig.pools[1].models[0].stepped)
    rig.rounds(1)
    assert len(rig.pools[1].models[0].stepped) == steps
    assert rig.end_of(second)[0].value == "cancelled"
    rig.cancel(first)


def test_a_step_longer_than_any_limit_is_no_hang_while_it_gets_on() -> None:
    rig = make_rig()
    worker, model = rig.workers[0], rig.pools[0].models[0]
    seen: list[float] = []
    step = model.step

    def long_step(beside: Beside = ALONE) -> list[StepEvent]:
        for _ in range(10):
            rig.clock.now += 30
            model.heartbeat += 1
            seen.append(worker.stalled_s())
        for _ in range(3):
            rig.clock.now += 30  # and now it hangs
            seen.append(worker.stalled_s())
        return step(beside)

    model.step = long_step  # type: ignore[method-assign]  # the same, later
    rig.submit()
    rig.rounds(1)
    assert seen == [0] * 10 + [30, 60, 90]


def test_many_steps_in_one_round_are_no_hang_either() -> None:
    rig = make_rig(pools=3)
    seen: list[float] = []
    for pool in range(3):
        model = slow(rig, pool, 50)
        step = model.step

        def step_and_look(
            beside: Beside = ALONE, *, step: Callable[[Beside], list[StepEvent]] = step
        ) -> list[StepEvent]:
            events = step(beside)
            seen.append(rig.workers[0].stalled_s())
            return events

        model.step = step_and_look  # type: ignore[method-assign]  # the same, and more
        rig.submit(pool=pool)
    rig.rounds(1)
    assert seen == [50, 50, 50]


@pytest.mark.parametrize(
    ("workers", "target_s", "lone_s"),
    [
        (WorkersConfig(), 0.12, 0.5),
        (WorkersConfig(stall_s=1), 0.05, 0.05),
        (WorkersConfig(step_target_ms=2000), 2.0, 2.0),
        (WorkersConfig(step_target_ms=60_000), 3.0, 3.0),
    ],
)
async def test_no_step_aims_at_more_than_a_share_of_the_time_after_which_it_would_be_a_hang(
    tiny_model_path: Path, workers: WorkersConfig, target_s: float, lone_s: float
) -> None:
    engine, stop = FakeEngine(), asyncio.Event()
    config = Config(workers=workers)
    observer = WhenReady(lambda summary: stop.set())
    server = Server(config, Credentials("t" * 20, "tests"), engine, [[Device("cpu", DeviceSpec("cpu"))]], observer)
    with contextlib.closing(listen("127.0.0.1", 0)) as listening:
        assert await server.run([tiny_model_path], listening, stop=stop) == 0
    ((spec, _),) = engine.specs
    assert (spec.step_target_s, spec.lone_step_s) == (target_s, lone_s)
