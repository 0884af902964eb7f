"""What the driver says of its GPUs, and which of them CUDA is shown."""

from __future__ import annotations

import pynvml
import pytest

from orchd.machine import gpus
from orchd.machine.gpus import Driver, Gpu, show_only, visible
from testkit.nvml import GIB, FakeNvml, large, small

LARGE = Gpu(0, "GPU-1a2b3c4d-0000-0000-0000-000000000001", "NVIDIA RTX 4090", 24 * GIB)
SMALL = Gpu(1, "GPU-8f5e0000-0000-0000-0000-000000000002", "NVIDIA RTX 3060", 12 * GIB)
THIRD = Gpu(2, "GPU-8f5f0000-0000-0000-0000-000000000003", "NVIDIA RTX 3060", 12 * GIB)
MIXED = [LARGE, SMALL]


# --- what the driver says --------------------------------------------------------------------------------------------


def test_gpus_are_found_with_what_the_driver_knows(nvml: FakeNvml) -> None:
    found = gpus.find_gpus()
    assert [(gpu.index, gpu.name, gpu.uuid, gpu.memory_bytes, gpu.pci) for gpu in found] == [
        (0, "NVIDIA GeForce RTX 4090", large().uuid, 24 * GIB, "0000:01:00.0"),
        (1, "NVIDIA GeForce RTX 3060", small().uuid, 12 * GIB, "0000:41:00.0"),
    ]
    assert nvml.initialised == 0


def test_a_gpu_whose_address_nvml_does_not_tell_can_still_be_used(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetPciInfo", refuse)
    assert [(gpu.index, gpu.pci) for gpu in gpus.find_gpus()] == [(0, ""), (1, "")]


def test_the_driver_says_its_version_and_its_cuda(nvml: FakeNvml) -> None:
    assert gpus.find_driver() == Driver("580.65.06", "13.0")
    assert nvml.initialised == 0


def test_without_a_driver_there_is_none_and_no_gpu(nvml: FakeNvml) -> None:
    nvml.error = pynvml.NVML_ERROR_LIBRARY_NOT_FOUND
    assert gpus.find_driver() is None
    assert gpus.find_gpus() == []
    assert gpus.free_gpu_bytes(0) is None


def test_a_card_that_does_not_answer_is_left_out_and_the_others_keep_their_numbers(
    nvml: FakeNvml, caplog: pytest.LogCaptureFixture
) -> None:
    nvml.cards[0].error = pynvml.NVML_ERROR_GPU_IS_LOST
    assert [gpu.index for gpu in gpus.find_gpus()] == [1]
    assert "gpu:0 is skipped: NVML reports GPU is lost" in caplog.text


def test_free_memory_is_asked_anew_each_time(nvml: FakeNvml) -> None:
    assert gpus.free_gpu_bytes(1) == 12 * GIB
    nvml.cards[1].used = 5 * GIB
    assert gpus.free_gpu_bytes(1) == 7 * GIB
    nvml.cards[1].error = pynvml.NVML_ERROR_GPU_IS_LOST
    assert gpus.free_gpu_bytes(1) is None
    assert gpus.free_gpu_bytes(2) is None


# --- CUDA_VISIBLE_DEVICES --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("listed", "left"),
    [
        ("", []),
        ("0", [LARGE]),
        ("1,0", [SMALL, LARGE]),
        (" 1 , 0 ", [SMALL, LARGE]),
        ("GPU-8f5e", [SMALL]),
        ("GPU-8f5e,0", [SMALL, LARGE]),
        ("-1", []),
        ("0,-1,1", [LARGE]),
        ("0,9,1", [LARGE]),
        ("0,,1", [LARGE]),
        ("NoDevFiles", []),
        ("0,0", [LARGE]),
        ("0,GPU-1a2b,1", [LARGE, SMALL]),
    ],
)
def test_what_is_already_hidden_stays_hidden(listed: str, left: list[Gpu]) -> None:
    assert visible(MIXED, {"CUDA_VISIBLE_DEVICES": listed}) == left


def test_without_the_variable_every_gpu_is_visible() -> None:
    assert visible(MIXED, {}) == MIXED


def test_a_uuid_that_several_gpus_have_the_beginning_of_ends_the_list() -> None:
    twins = [SMALL, Gpu(2, "GPU-8f5e1111-0000-0000-0000-000000000003", "NVIDIA RTX 3060", 12 * GIB)]
    assert visible(twins, {"CUDA_VISIBLE_DEVICES": "GPU-8f5e"}) == []


def test_cuda_is_shown_the_used_gpus_by_uuid_in_the_order_of_their_ordinals() -> None:
    environ = {"CUDA_VISIBLE_DEVICES": "0,1,2", "PATH": "/bin"}
    show_only([SMALL, LARGE], environ)
    uuids = f"{SMALL.uuid},{LARGE.uuid}"
    assert environ == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": uuids, "PATH": "/bin"}


def test_a_process_without_gpu_pools_is_shown_none() -> None:
    environ: dict[str, str] = {}
    show_only([], environ)
    assert environ["CUDA_VISIBLE_DEVICES"] == ""
    assert environ["GGML_DISABLE_VULKAN"] == "1"
