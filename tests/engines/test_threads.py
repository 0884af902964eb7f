"""Which threads compute, and where."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engines.api import DeviceSpec, ModelSpec, SamplingParams, Sequence
from engines.llamacpp.model import LlamaModel

CPUS = sorted(os.sched_getaffinity(0))
pytestmark = pytest.mark.skipif(len(CPUS) < 2, reason="one CPU; run it on a machine with two")


def affinities() -> dict[str, set[int]]:
    """The CPUs of each thread of this process, by thread id."""
    return {task: os.sched_getaffinity(int(task)) for task in os.listdir("/proc/self/task")}


def test_each_thread_stays_on_its_cpu_and_the_loading_one_is_free(tiny_model_path: Path) -> None:
    before = affinities()
    spec = ModelSpec(tiny_model_path, slots=2, ctx=64)
    with ThreadPoolExecutor(1) as loader, ThreadPoolExecutor(1) as stepper:
        model = loader.submit(LlamaModel, spec, DeviceSpec("cpu", threads=2, cpus=(CPUS[0], CPUS[1]))).result()
        try:
            assert loader.submit(os.sched_getaffinity, 0).result() == set(CPUS)
            mine = {task: cpus for task, cpus in affinities().items() if task not in before and len(cpus) == 1}
            assert list(mine.values()) == [{CPUS[0]}]
            model.admit(Sequence("a", [1, 2], 2, sampling=SamplingParams(temperature=0)))
            stepper.submit(lambda: list(model.step())).result()
            assert stepper.submit(os.sched_getaffinity, 0).result() == {CPUS[1]}
        finally:
            model.close()


def test_threads_move_where_nothing_is_said(tiny_model_path: Path) -> None:
    before = affinities()
    with ThreadPoolExecutor(1) as loader:
        spec = ModelSpec(tiny_model_path, slots=2, ctx=64)
        model = loader.submit(LlamaModel, spec, DeviceSpec("cpu", threads=2)).result()
        assert {frozenset(cpus) for task, cpus in affinities().items() if task not in before} == {frozenset(CPUS)}
        model.close()
