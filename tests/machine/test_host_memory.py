"""What a process may still take: made-up trees of procfs and control groups, and the ones of this machine."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from orchd.machine import host_memory, memory

MIB = 2**20
UNLIMITED = 9223372036854771712  # as version 1 writes it


class Host:
    """A tree with so much memory available, and no limits unless they are given."""

    def __init__(self, folder: Path, *, available: int | None = 1000 * MIB) -> None:
        self.proc = folder / "proc"
        self.groups = folder / "sys fs cgroup"
        (self.proc / "self").mkdir(parents=True)
        if available is not None:
            self.write("meminfo", f"MemTotal:  9999999 kB\nMemAvailable:  {available // 1024} kB\n")
        self.write("self/status", f"Name:\tx\nVmSize:\t  {50 * 1024} kB\nVmData:\t  {20 * 1024} kB\n")
        self.limits("unlimited", "unlimited")

    def write(self, name: str, text: str) -> None:
        (self.proc / name).write_text(text)

    def limits(self, space: object, data: object) -> None:
        self.write("self/limits", f"Max data size   {data}  unlimited  bytes\nMax address space   {space}  9  bytes\n")

    def mount(self, *lines: str) -> None:
        top = str(self.groups).replace(" ", "\\040")
        self.write(
            "self/mountinfo",
            "".join(f"{line.replace('TOP', top)}\n" for line in ("1 0 8:1 / / rw - ext4 /dev/sda rw", *lines)),
        )

    def group(self, path: str, **files: object) -> None:
        folder = self.groups / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in files.items():
            (folder / f"memory.{name}").write_text(f"{value}\n")

    @property
    def free(self) -> int | None:
        return host_memory.free_bytes(self.proc)


V2 = "31 23 0:28 / TOP rw,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "35 31 0:32 / TOP/memory rw,relatime - cgroup cgroup rw,memory"


def test_without_limits_it_is_what_the_host_has(tmp_path: Path) -> None:
    assert Host(tmp_path).free == 1000 * MIB


def test_a_host_that_says_nothing_is_not_guessed_at(tmp_path: Path) -> None:
    assert Host(tmp_path, available=None).free is None
    assert host_memory.free_bytes(tmp_path / "nowhere") is None


def test_a_group_allows_its_limit_less_what_is_used_and_cannot_be_taken_back(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.mount(V2)
    host.write("self/cgroup", "0::/user.slice/orchd.service\n")
    host.group(
        "user.slice/orchd.service",
        max=500 * MIB,
        high="max",
        current=300 * MIB,
        stat=f"anon 5\ninactive_anon 7\nactive_file {30 * MIB}\ninactive_file {20 * MIB}",
    )
    assert host.free == 250 * MIB
    host.group("user.slice/orchd.service", high=400 * MIB)
    assert host.free == 150 * MIB


@pytest.mark.parametrize("level", ["", "a", "a/b", "a/b/c"])
def test_the_tightest_group_above_counts_too(tmp_path: Path, level: str) -> None:
    host = Host(tmp_path)
    host.mount(V2)
    host.write("self/cgroup", "0::/a/b/c\n")
    for path in ("a", "a/b", "a/b/c"):
        host.group(path, max="max", current=100 * MIB, stat="inactive_file 0\nactive_file 0")
    host.group("other", max=1, current=0)
    host.group(level, max=160 * MIB, current=100 * MIB)
    assert host.free == 60 * MIB


def test_a_group_that_is_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.mount(V2)
    host.write("self/cgroup", "0::/\n")
    host.group("", max=100 * MIB, current=120 * MIB, stat="")
    assert host.free == 0


def test_version_1(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.mount(V1, "36 31 0:33 / TOP/cpu rw - cgroup cgroup rw,cpu")
    host.write("self/cgroup", "5:cpu,cpuacct:/elsewhere\n4:memory:/jobs/one\n1:name=systemd:/\n")
    files = {
        "usage_in_bytes": 100 * MIB,
        "stat": f"active_file 1\ntotal_inactive_file {MIB}\ntotal_active_file {2 * MIB}",
    }
    host.group("memory/jobs/one", limit_in_bytes=UNLIMITED, **files)
    host.group("memory/jobs", limit_in_bytes=150 * MIB, **files)
    host.group("cpu/elsewhere", limit_in_bytes=1, usage_in_bytes=0)
    assert host.free == 53 * MIB


def test_both_versions_at_once(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.mount(V1, "41 31 0:38 / TOP/unified rw - cgroup2 cgroup2 rw")
    host.write("self/cgroup", "4:memory:/jobs\n0::/x\n")
    host.group("memory/jobs", limit_in_bytes=90 * MIB, usage_in_bytes=10 * MIB)
    host.group("unified/x")  # its controller is the other's
    assert host.free == 80 * MIB


@pytest.mark.parametrize("path", ["/docker/1234", "/", "/../../docker/1234", "/some/where/else"])
@pytest.mark.parametrize("root", ["/docker/1234", "/"])
def test_in_a_container_its_own_group_is_what_is_mounted(tmp_path: Path, path: str, root: str) -> None:
    host = Host(tmp_path)
    host.mount(V2.replace(" / TOP", f" {root} TOP"))
    host.write("self/cgroup", f"0::{path}\n")
    host.group("", max=200 * MIB, current=50 * MIB)
    assert host.free == 150 * MIB


def test_rlimits_count_as_well(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.limits(space=350 * MIB, data="unlimited")
    assert host.free == 300 * MIB
    host.limits(space=350 * MIB, data=100 * MIB)
    assert host.free == 80 * MIB


@pytest.mark.parametrize("name", ["self/cgroup", "self/mountinfo", "self/limits", "self/status"])
@pytest.mark.parametrize("text", [None, "", "\0\n", "nonsense\n:::\n- - -\n4:memory\n", "\udcff"])
def test_what_cannot_be_understood_limits_nothing(tmp_path: Path, name: str, text: str | None) -> None:
    host = Host(tmp_path)
    host.mount(V2, V1)
    host.write("self/cgroup", "0::/\n4:memory:/\n")
    host.group("", max="nonsense", current="")
    if text is None:
        (host.proc / name).unlink()
    else:
        (host.proc / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert host.free == 1000 * MIB


def test_a_models_fit_is_judged_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "free_bytes", lambda: 7)
    assert memory.free_bytes("cpu") == 7


def test_on_this_machine_it_is_at_most_what_is_available() -> None:
    available = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024
    free = host_memory.free_bytes()
    assert free is not None
    assert 0 < free < 2 * available


def test_an_address_space_that_is_limited_for_real(tmp_path: Path) -> None:
    program = "from orchd.machine import host_memory; print(host_memory.free_bytes())"
    limited = subprocess.run(
        [sys.executable, "-c", program],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (300 * MIB, 300 * MIB)),
        cwd=Path(__file__).parents[2],
        capture_output=True,
        check=True,
    )
    assert 0 < int(limited.stdout) < 300 * MIB
