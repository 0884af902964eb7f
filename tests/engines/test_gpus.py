"""Which of the GPUs that llama.cpp lists is meant: Vulkan counts in an order of its own, orchd as NVML does."""

from __future__ import annotations

import re

import pytest

from engines.api import DeviceSpec
from engines.errors import LoadFailed
from engines.llamacpp.build import gpu_backend
from engines.llamacpp.native import gpus
from engines.llamacpp.native.gpus import Listed, index_of, match

P40 = Listed("Tesla P40", "0000:41:00.0")
GTX = Listed("NVIDIA GeForce GTX 1080", "0000:01:00.0")
RADEON = Listed("AMD Radeon RX 6600", "0000:0a:00.0")
SOFTWARE = Listed("llvmpipe", "")


def gpu(ordinal: int, pci: str) -> DeviceSpec:
    return DeviceSpec("gpu", ordinal, pci=pci)


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ([GTX, P40], [0, 1]),
        ([P40, GTX], [1, 0]),
        ([RADEON, P40, SOFTWARE, GTX], [3, 1]),
    ],
    ids=["as NVML", "the other way round", "among others"],
)
def test_a_gpu_is_found_by_its_pci_address(listed: list[Listed], expected: list[int]) -> None:
    assert [match(gpu(0, GTX.pci), listed), match(gpu(1, P40.pci), listed)] == expected


def test_one_of_two_that_is_left_over_by_cuda_visible_devices_is_still_itself() -> None:
    """The only GPU that is used has the ordinal 0, wherever Vulkan lists it."""
    assert match(gpu(0, P40.pci), [GTX, P40]) == 1


def test_devices_without_addresses_are_counted() -> None:
    assert [match(gpu(n, f"0000:0{n}:00.0"), [SOFTWARE, SOFTWARE]) for n in range(2)] == [0, 1]


@pytest.mark.parametrize(
    ("device", "listed", "shown"),
    [
        (gpu(0, GTX.pci), [P40, SOFTWARE], "only: Tesla P40 at 0000:41:00.0, llvmpipe at no address;"),
        (gpu(0, GTX.pci), [], "only: none;"),
        (gpu(1, GTX.pci), [SOFTWARE], "only: llvmpipe at no address;"),
    ],
)
def test_another_gpu_is_never_taken_instead(device: DeviceSpec, listed: list[Listed], shown: str) -> None:
    with pytest.raises(LoadFailed, match=re.escape(f"Vulkan shows no GPU at PCI address {device.pci}, {shown}")):
        match(device, listed)


def test_cuda_counts_as_it_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "gpu_backend", lambda: "CUDA")
    assert index_of(gpu(1, GTX.pci)) == 1
    assert index_of(DeviceSpec("cpu")) is None


def test_llama_cpp_lists_them_only_if_it_was_built_for_vulkan() -> None:
    listed = list(gpus._vulkan_gpus())
    assert listed == [] or gpu_backend() == "Vulkan"
    assert all(one.name for one in listed)
