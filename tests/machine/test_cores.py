"""Which cores count, and when all of them are needed."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchd.machine.cores import crowded_cpus, usable_cores


def test_there_is_at_least_one_usable_core() -> None:
    assert usable_cores() >= 1


def test_two_threads_of_one_core_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: {0, 1, 2, 3, 4})
    for thread, siblings in enumerate(["0,2", "1,3", "0,2", "1,3"]):
        folder = tmp_path / f"cpu{thread}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings + "\n")
    assert usable_cores(tmp_path) == 3, "two cores of two threads, and one thread that nothing is known of"


@pytest.mark.parametrize(("cores", "crowded"), [(4, (0, 1, 2, 3)), (2, ())])
def test_cpus_are_crowded_where_each_is_a_core(
    monkeypatch: pytest.MonkeyPatch, cores: int, crowded: tuple[int, ...]
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3, 1, 0, 2})
    monkeypatch.setattr("orchd.machine.cores.usable_cores", lambda: cores)
    assert crowded_cpus() == crowded
