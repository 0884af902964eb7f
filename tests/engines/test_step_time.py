"""How long steps are, in rows: alone, beside streams of another model, and on a machine where each row takes long."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engines.api import Beside, DeviceSpec, Prompt
from engines.llamacpp.batch import TILE
from engines.llamacpp.model import LlamaModel
from testkit.builders import Clock, make_task
from tests.engines.support import exact, sequence
from tests.pools.rig import make_rig

PROMPT = [5 + n % 90 for n in range(1500)]


@contextmanager
def timed(path: Path, clock: Clock, *, row_s: float) -> Iterator[tuple[LlamaModel, list[int]]]:
    """A model on a machine where a row takes so long, and the rows of its steps."""
    spec = exact(path, slots=2, ctx=2048, batch=512)
    model = LlamaModel(spec, DeviceSpec("cpu", threads=1), clock=clock)
    rows: list[int] = []
    decode = model._context.decode

    def slowly(n_rows: int) -> None:
        rows.append(n_rows)
        clock.now += row_s * n_rows
        decode(n_rows)

    model._context.decode = slowly  # type: ignore[method-assign]  # the same, on a slower machine
    try:
        yield model, rows
    finally:
        model.close()


def test_a_lone_prompt_comes_in_steps_of_half_a_second(tiny_model_path: Path) -> None:
    with timed(tiny_model_path, Clock(), row_s=0.005) as (model, rows):
        model.admit(sequence(PROMPT, 1))
        while model.busy:
            model.step()
        assert sum(rows) == len(PROMPT)
        assert max(rows) <= 100


def test_where_a_row_takes_half_a_minute_a_step_is_as_short_as_can_be(tiny_model_path: Path) -> None:
    with timed(tiny_model_path, Clock(), row_s=30.0) as (model, rows):
        model.admit(sequence(PROMPT, 1))
        for _ in range(4):
            model.step()
        assert max(rows) <= 32
        assert rows[-1] == 16


def test_a_machine_that_is_fast_enough_soon_takes_whole_batches(tiny_model_path: Path) -> None:
    with timed(tiny_model_path, Clock(), row_s=0.0005) as (model, rows):
        model.admit(sequence(PROMPT, 1))
        while model.busy:
            model.step()
        assert rows[:3] == [16, 512, 512]


def test_a_prompt_that_is_cancelled_leaves_its_slot_after_one_short_step(tiny_model_path: Path) -> None:
    with timed(tiny_model_path, Clock(), row_s=0.005) as (model, rows):
        model.admit(sequence(PROMPT, 1, key="long"))
        model.step()
        model.step()
        assert model.cancel("long")
        assert (model.free_slots, max(rows) <= 100) == (2, True)


def test_streams_of_another_model_split_a_prompt(tiny_model_path: Path) -> None:
    with timed(tiny_model_path, Clock(), row_s=0.001) as (model, rows):
        model.admit(sequence(PROMPT, 1))
        while model.busy:
            model.step(Beside(streams=1, streams_s=0.02))
        assert max(rows) <= 100


def test_a_prompt_in_one_pool_leaves_the_streams_of_another_on_the_device_their_pace(tiny_model_path: Path) -> None:
    """Two pools on one worker, real models, 1 ms a row: a round took 0.51 s, and takes no more than the target."""
    rig = make_rig(pools=2)
    with (
        timed(tiny_model_path, rig.clock, row_s=0.001) as (streaming, _),
        timed(tiny_model_path, rig.clock, row_s=0.001) as (prefilling, rows),
    ):
        for pool, model in zip(rig.pools, (streaming, prefilling), strict=True):
            pool.replicas[0].instances[0].model = model
        stream = rig.submit(pool=0, max_tokens=500)
        rig.rounds(3)
        long = make_task(max_tokens=1, pool_id="1")
        long.prompt = Prompt(PROMPT)
        with rig.pools[1].scheduler.reservation(long.priority):
            rig.pools[1].scheduler.submit(long)
        gaps = []
        while not rig.ends().get(long.id):
            tokens, began = stream.tokens_out, rig.clock.now
            rig.rounds(1)
            assert stream.tokens_out == tokens + 1
            gaps.append(rig.clock.now - began)
    assert sum(rows) == len(PROMPT)
    assert max(rows) <= 2 * TILE
    assert max(gaps) <= 0.125


def test_a_step_on_the_cpu_tells_how_it_gets_on(tiny_model_path: Path) -> None:
    with timed(tiny_model_path, Clock(), row_s=0.0) as (model, _):
        model.admit(sequence(PROMPT[:100], 5))
        counts = set()
        while model.busy:
            model.step()
            counts.add(model.heartbeat)
        assert min(counts) > 10  # each step counts from 0
        assert max(counts) < 1000
