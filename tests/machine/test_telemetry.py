"""What is known of the GPUs, and when they are asked."""

from __future__ import annotations

import logging
import threading

import pynvml
import pytest

from orchd.machine import telemetry
from orchd.machine.telemetry import STALE_S, Reading, Telemetry
from testkit.builders import Clock
from testkit.nvml import GIB, FakeNvml


def make(*devices: str, clock: Clock | None = None) -> Telemetry:
    return Telemetry(devices or ("gpu:0", "gpu:1"), clock=clock or Clock())


def test_a_reading_is_free_memory_and_a_share_of_time(nvml: FakeNvml) -> None:
    nvml.cards[0].used, nvml.cards[0].busy = 5 * GIB, 37
    known = make()
    known.look()
    assert known.reading("gpu:0") == Reading(19 * GIB, 0.37)
    assert known.reading("gpu:1") == Reading(12 * GIB, 0.0)
    assert known.reading("cpu") is None


def test_a_card_that_does_not_tell_its_load_has_the_rest(nvml: FakeNvml) -> None:
    nvml.cards[0].busy = None
    known = make()
    known.look()
    assert known.reading("gpu:0") == Reading(24 * GIB, None)


@pytest.mark.parametrize(("says", "means"), [(0, 0.0), (100, 1.0), (255, 1.0)])
def test_a_share_is_never_more_than_1(nvml: FakeNvml, says: int, means: float) -> None:
    nvml.cards[0].busy = says
    known = make("gpu:0")
    known.look()
    reading = known.reading("gpu:0")
    assert reading is not None
    assert reading.utilization == means


def test_asking_here_asks_nobody(nvml: FakeNvml) -> None:
    known = make()
    known.look()
    before = nvml.calls.total()
    for _ in range(1000):
        known.reading("gpu:0")
        known.lost("gpu:1")
    assert nvml.calls.total() == before


def test_each_round_asks_each_gpu_once(nvml: FakeNvml) -> None:
    known = make()
    for _ in range(3):
        known.look()
    assert nvml.calls["nvmlDeviceGetMemoryInfo"] == nvml.calls["nvmlDeviceGetUtilizationRates"] == 6
    assert nvml.calls["nvmlInit"] == 1


def test_what_shrinks_is_seen_in_the_next_round(nvml: FakeNvml) -> None:
    known = make()
    known.look()
    nvml.cards[1].used += 3 * GIB
    known.look()
    assert known.reading("gpu:1") == Reading(9 * GIB, 0.0)


def test_an_old_reading_is_none(nvml: FakeNvml) -> None:
    clock = Clock()
    known = make(clock=clock)
    known.look()
    clock.now += STALE_S
    assert known.reading("gpu:0") is not None
    clock.now += 0.1
    assert known.reading("gpu:0") is None
    assert known.lost("gpu:0") is None  # NVML hangs; nobody knows about CUDA


@pytest.mark.parametrize(
    "code",
    [
        pynvml.NVML_ERROR_GPU_IS_LOST,
        pynvml.NVML_ERROR_RESET_REQUIRED,
        pynvml.NVML_ERROR_NOT_FOUND,
        pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
    ],
)
def test_a_lost_gpu_has_no_reading_and_the_other_one_has(nvml: FakeNvml, code: int) -> None:
    known = make()
    nvml.cards[0].error = code
    known.look()
    assert known.reading("gpu:0") is None
    assert known.lost("gpu:0") == str(pynvml.NVMLError(code))
    assert known.reading("gpu:1") is not None
    assert known.lost("gpu:1") is None
    nvml.cards[0].error = None
    known.look()
    assert known.reading("gpu:0") is not None
    assert known.lost("gpu:0") is None


@pytest.mark.parametrize("code", [pynvml.NVML_ERROR_TIMEOUT, pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH])
def test_what_says_nothing_about_cuda_loses_no_gpu(nvml: FakeNvml, code: int) -> None:
    known = make()
    known.look()
    nvml.error = code
    known.look()
    assert known.reading("gpu:0") is None
    assert known.lost("gpu:0") is None


def test_a_lost_gpu_stays_lost_until_it_answers(nvml: FakeNvml) -> None:
    known = make()
    nvml.cards[0].error = pynvml.NVML_ERROR_GPU_IS_LOST
    known.look()
    nvml.cards[0].error = pynvml.NVML_ERROR_TIMEOUT
    known.look()
    assert known.lost("gpu:0") == str(pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST))


def test_nvml_is_started_anew_after_a_reset_of_the_driver(nvml: FakeNvml) -> None:
    known = make()
    known.look()
    nvml.error = pynvml.NVML_ERROR_DRIVER_NOT_LOADED
    known.look()
    assert known.lost("gpu:0") is not None
    assert known.lost("gpu:1") is not None
    nvml.error, nvml.initialised = None, 0
    known.look()
    assert known.reading("gpu:1") == Reading(12 * GIB, 0.0)
    assert known.lost("gpu:0") is None


def test_trouble_is_logged_once_and_its_end_too(nvml: FakeNvml, caplog: pytest.LogCaptureFixture) -> None:
    known = make()
    with caplog.at_level(logging.WARNING, "orchd.machine.telemetry"):
        nvml.cards[1].error = pynvml.NVML_ERROR_GPU_IS_LOST
        for _ in range(5):
            known.look()
        nvml.cards[1].error = None
        for _ in range(5):
            known.look()
    assert [record.getMessage() for record in caplog.records] == [
        f"gpu:1 cannot be queried: NVML reports {pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)}; "
        "its metrics are omitted meanwhile",
        "gpu:1 responds again",
    ]


def test_it_looks_on_a_thread_of_its_own(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "PERIOD_S", 0.001)
    known = make()
    known.start()
    known.await_look(10)
    assert known.reading("gpu:0") is not None
    known.close()
    assert nvml.threads == {"nvml"}
    assert nvml.initialised == 0


def test_a_driver_that_hangs_holds_up_nobody(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "PERIOD_S", 0.001)
    moves = threading.Event()
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: moves.wait(30))
    known = make()
    known.start()
    known.await_look(0.01)
    assert known.reading("gpu:0") is None
    known.close()
    moves.set()


def test_something_unforeseen_does_not_end_the_looking(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "PERIOD_S", 0.001)
    answer, looked = pynvml.nvmlDeviceGetMemoryInfo, threading.Event()

    def fails_once(card: object) -> object:
        if not looked.is_set():
            looked.set()
            raise OSError("unforeseen")
        again.set()
        return answer(card)

    again = threading.Event()
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", fails_once)
    known = make()
    known.start()
    assert again.wait(10)
    known.close()


def test_without_a_gpu_there_is_no_thread_and_nobody_is_asked(nvml: FakeNvml) -> None:
    known = make("cpu", "cpu#1")
    known.start()
    known.await_look(10)
    known.close()
    assert nvml.calls.total() == 0
