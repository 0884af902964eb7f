"""Which devices a pool gets, with made-up GPUs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from engines.api import DeviceSpec
from orchd.errors import ConfigError
from orchd.machine.devices import Device, Gpu, assign, crowded_cpus, show_only, usable_cores, visible
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


# --- assign ----------------------------------------------------------------------------------------------------------


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
    _, used = assign([make_pool("gpu:1")], visible([LARGE, SMALL, THIRD], environ), gpu_build=True, cores=8)
    show_only(used, environ)
    assert environ == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": SMALL.uuid, "PATH": "/bin"}


def test_a_process_without_gpu_pools_is_shown_none() -> None:
    environ: dict[str, str] = {}
    show_only(assign([make_pool("cpu")], MIXED, gpu_build=True, cores=8)[1], environ)
    assert environ["CUDA_VISIBLE_DEVICES"] == ""
    assert environ["GGML_DISABLE_VULKAN"] == "1"


def test_there_is_at_least_one_usable_core() -> None:
    assert usable_cores() >= 1


def test_two_threads_of_one_core_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: {0, 1, 2, 3, 4})
    for thread, siblings in enumerate(["0,2", "1,3", "0,2", "1,3"]):
        folder = tmp_path / f"cpu{thread}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings + "\n")
    assert usable_cores(tmp_path) == 3, "two cores of two threads, and one thread that nothing is known of"


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


@pytest.mark.parametrize(("cores", "crowded"), [(4, (0, 1, 2, 3)), (2, ())])
def test_cpus_are_crowded_where_each_is_a_core(
    monkeypatch: pytest.MonkeyPatch, cores: int, crowded: tuple[int, ...]
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3, 1, 0, 2})
    monkeypatch.setattr("orchd.machine.devices.usable_cores", lambda: cores)
    assert crowded_cpus() == crowded
