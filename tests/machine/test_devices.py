"""Which devices a pool gets, with made-up GPUs."""

from __future__ import annotations

import dataclasses

import pytest

from engines.api import DeviceSpec
from orchd.errors import ConfigError
from orchd.machine.devices import Device, assign, gpu_index
from orchd.machine.gpus import Gpu, visible
from orchd.settings.config import PoolConfig

GIB = 2**30
LARGE = Gpu(0, "GPU-1a2b3c4d-0000-0000-0000-000000000001", "NVIDIA RTX 4090", 24 * GIB)
SMALL = Gpu(1, "GPU-8f5e0000-0000-0000-0000-000000000002", "NVIDIA RTX 3060", 12 * GIB)
THIRD = Gpu(2, "GPU-8f5f0000-0000-0000-0000-000000000003", "NVIDIA RTX 3060", 12 * GIB)
MIXED = [LARGE, SMALL]


def make_pool(*devices: str, pool_id: str = "default", threads: int = 0) -> PoolConfig:
    return PoolConfig(id=pool_id, devices=devices or "auto", threads=threads)


def names(pool: PoolConfig, gpus: list[Gpu], *, gpu_build: bool = True) -> list[str]:
    return [device.name for device in assign([pool], gpus, gpu_build=gpu_build, cores=8)[0][0]]


def test_auto_takes_every_gpu() -> None:
    devices, used = assign([make_pool()], MIXED, gpu_build=True, cores=8)
    assert devices == [[Device("gpu:0", DeviceSpec("gpu", 0, 8)), Device("gpu:1", DeviceSpec("gpu", 1, 8))]]
    assert used == MIXED


def test_a_gpu_keeps_its_pci_address_whatever_its_ordinal() -> None:
    gpus = [dataclasses.replace(gpu, pci=f"0000:{gpu.index:02x}:00.0") for gpu in MIXED]
    [[device]], _ = assign([make_pool()], visible(gpus, {"CUDA_VISIBLE_DEVICES": "1"}), gpu_build=True, cores=8)
    assert device == Device("gpu:1", DeviceSpec("gpu", 0, 8, pci="0000:01:00.0"))


@pytest.mark.parametrize(("gpus", "gpu_build"), [([], True), ([], False), (MIXED, False)])
def test_auto_takes_one_cpu_where_no_gpu_can_be_used(gpus: list[Gpu], gpu_build: bool) -> None:
    devices, used = assign([make_pool()], gpus, gpu_build=gpu_build, cores=8)
    assert devices == [[Device("cpu", DeviceSpec("cpu", 0, 8))]]
    assert used == []


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("gpu:0", [LARGE, SMALL]),
        ("gpu:GPU-1a2b3c4d-0000-0000-0000-000000000001", [SMALL, LARGE]),
        ("gpu:GPU-1a2b", [SMALL, LARGE]),
        ("gpu:1a2b", [SMALL, LARGE]),
        ("gpu:GPU-1A2B", [SMALL, LARGE]),
    ],
)
def test_a_gpu_is_named_by_number_or_by_the_beginning_of_its_uuid(name: str, there: list[Gpu]) -> None:
    assert names(make_pool(name), there) == ["gpu:0"]


def test_a_number_is_never_read_as_the_beginning_of_a_uuid() -> None:
    assert names(make_pool("gpu:1"), MIXED) == ["gpu:1"]  # the UUID of gpu:0 begins with a 1
    with pytest.raises(ConfigError, match=r"no gpu:8 \(available: gpu:0, gpu:1\)"):
        names(make_pool("gpu:8"), MIXED)


def test_a_gpu_that_is_not_there_is_an_error_that_lists_those_that_are() -> None:
    with pytest.raises(ConfigError, match=r'pool "default": there is no gpu:7 \(available: gpu:0, gpu:1\)'):
        names(make_pool("gpu:7"), MIXED)
    with pytest.raises(ConfigError, match=r"no gpu:0 \(available: none\)"):
        names(make_pool("gpu:0"), [])


def test_the_beginning_of_two_uuids_is_not_enough() -> None:
    with pytest.raises(ConfigError, match="no gpu:GPU-8f5"):
        names(make_pool("gpu:GPU-8f5"), [LARGE, SMALL, THIRD])
    twins = [SMALL, Gpu(2, "GPU-8f5e1111-0000-0000-0000-000000000003", "NVIDIA RTX 3060", 12 * GIB)]
    with pytest.raises(ConfigError, match="gpu:8f5e matches gpu:1 and gpu:2; use more"):
        names(make_pool("gpu:8f5e"), twins)


@pytest.mark.parametrize("twice", [("gpu:0", "gpu:GPU-1a2b"), ("gpu:1a2b", "gpu:0")])
def test_a_gpu_stands_once_in_a_pool_however_it_is_named(twice: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match="is listed twice"):
        names(make_pool(*twice), MIXED)


def test_a_gpu_needs_a_build_for_gpus() -> None:
    with pytest.raises(ConfigError, match="built for the CPU only"):
        names(make_pool("gpu:0"), MIXED, gpu_build=False)


def test_ordinals_count_only_the_gpus_that_are_used_in_one_order_for_all_pools() -> None:
    pools = [make_pool("gpu:2", pool_id="a"), make_pool("gpu:2", "gpu:1", "cpu", pool_id="b")]
    devices, used = assign(pools, [LARGE, SMALL, THIRD], gpu_build=True, cores=8)
    assert used == [SMALL, THIRD]
    assert [(device.name, device.spec.kind, device.spec.ordinal) for device in devices[0]] == [("gpu:2", "gpu", 1)]
    assert [(device.name, device.spec.kind, device.spec.ordinal) for device in devices[1]] == [
        ("gpu:2", "gpu", 1),
        ("gpu:1", "gpu", 0),
        ("cpu", "cpu", 0),
    ]


def test_the_cores_are_divided_among_the_cpu_workers() -> None:
    devices, _ = assign([make_pool("cpu", "cpu")], [], gpu_build=False, cores=8)
    assert devices == [[Device("cpu#0", DeviceSpec("cpu", 0, 4)), Device("cpu#1", DeviceSpec("cpu", 0, 4))]]


def test_there_is_at_least_one_thread_for_each_cpu_worker() -> None:
    devices, _ = assign([make_pool("cpu", "cpu", "cpu")], [], gpu_build=False, cores=2)
    assert [device.spec.threads for device in devices[0]] == [1, 1, 1]


def test_the_nth_cpu_of_every_pool_is_the_same_worker() -> None:
    pools = [make_pool("cpu", pool_id="a"), make_pool("cpu", "cpu", pool_id="b")]
    devices, _ = assign(pools, [], gpu_build=False, cores=8)
    assert [[device.name for device in pool] for pool in devices] == [["cpu#0"], ["cpu#0", "cpu#1"]]
    assert {device.spec.threads for pool in devices for device in pool} == {4}


def test_a_pools_own_number_of_threads_wins() -> None:
    devices, _ = assign([make_pool("cpu", "gpu:0", threads=3)], MIXED, gpu_build=True, cores=8)
    assert [device.spec.threads for device in devices[0]] == [3, 3]


def test_threads_on_every_core_are_kept_there() -> None:
    pools = [make_pool("cpu", "cpu"), make_pool("cpu", pool_id="b")]
    devices, _ = assign(pools, [], gpu_build=False, cores=4, cpus=(0, 2, 4, 6))
    assert [[device.spec.cpus for device in entry] for entry in devices] == [[(0, 2), (4, 6)], [(0, 2)]]


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_other_numbers_of_threads_may_move(threads: int) -> None:
    devices, _ = assign([make_pool("cpu", threads=threads)], [], gpu_build=False, cores=4, cpus=(0, 1, 2, 3))
    assert devices[0][0].spec.cpus == ()


def test_a_thread_alone_may_move() -> None:
    devices, _ = assign([make_pool("cpu", "cpu")], [], gpu_build=False, cores=2, cpus=(0, 1))
    assert [device.spec.cpus for device in devices[0]] == [(), ()]


def test_a_device_has_an_index_if_it_is_a_gpu() -> None:
    assert [gpu_index(name) for name in ("gpu:0", "gpu:12", "cpu", "cpu#1")] == [0, 12, None, None]
