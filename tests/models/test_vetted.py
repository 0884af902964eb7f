"""What is remembered of a vetted file, and what is not, because it would not be safe."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path

import pytest

from engines.api import Footprint, ModelSpec
from engines.llamacpp.build import identity
from orchd.models import vetted
from orchd.models.vetted import Vetted

BUILD = [("libllama.so", 1, 2)]
FOOTPRINT = Footprint(weights=1, cache=2, buffers=3)


@pytest.fixture
def memory(tmp_path: Path) -> Vetted:
    return Vetted(BUILD, tmp_path / "cache")


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelSpec:
    """A file that nobody has touched for a while: it is the clock that is ahead."""
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    ahead = time.time() + 60
    monkeypatch.setattr("orchd.models.vetted.clock", lambda: ahead)
    monkeypatch.setattr(vetted, "_filesystem_of", lambda device: "ext4")
    return ModelSpec(path)


def records(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache").rglob("*.json"))


def test_a_file_that_has_served_is_known(memory: Vetted, spec: ModelSpec) -> None:
    assert memory.take(spec) is None
    memory.keep(spec, FOOTPRINT)
    assert memory.take(spec) == FOOTPRINT


def test_it_is_forgotten_while_it_is_used(memory: Vetted, spec: ModelSpec) -> None:
    """If the load ends the process, the next start vets the file."""
    memory.keep(spec, FOOTPRINT)
    memory.take(spec)
    assert memory.take(spec) is None
    memory.keep(spec, FOOTPRINT)
    assert memory.take(spec) == FOOTPRINT


def test_a_byte_that_was_changed_in_place_is_noticed_even_if_the_time_is_set_back(
    memory: Vetted, spec: ModelSpec
) -> None:
    memory.keep(spec, FOOTPRINT)
    before = spec.path.stat()
    time.sleep(0.02)  # longer than the kernel's clock ticks
    with spec.path.open("r+b") as file:
        file.seek(50)
        file.write(b"x")
    os.utime(spec.path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert spec.path.stat().st_mtime_ns == before.st_mtime_ns
    assert memory.take(spec) is None


def test_another_file_in_its_place_is_another(memory: Vetted, spec: ModelSpec, tmp_path: Path) -> None:
    memory.keep(spec, FOOTPRINT)
    other = tmp_path / "other"
    other.write_bytes(spec.path.read_bytes())
    before = spec.path.stat()
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.rename(spec.path)
    assert memory.take(spec) is None


@pytest.mark.parametrize("change", [{"slots": 5}, {"ctx": 512}, {"cache_type_k": "q8_0"}, {"swa_full": True}])
def test_another_shape_is_not_known(memory: Vetted, spec: ModelSpec, change: dict[str, object]) -> None:
    memory.keep(spec, FOOTPRINT)
    assert memory.take(dataclasses.replace(spec, **change)) is None  # type: ignore[arg-type]


def test_another_build_vets_again(memory: Vetted, spec: ModelSpec, tmp_path: Path) -> None:
    memory.keep(spec, FOOTPRINT)
    assert Vetted([("libllama.so", 1, 3)], tmp_path / "cache").take(spec) is None
    assert memory.take(spec) == FOOTPRINT


def test_a_build_is_known_by_its_libraries_and_its_code() -> None:
    names = {name for name, _, _ in identity()}
    assert {"libllama.so", "libggml-base.so", "vet.py", "context.py"} <= names


def test_a_file_that_was_just_written_is_not_remembered(
    memory: Vetted, spec: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = spec.path.stat().st_ctime
    monkeypatch.setattr("orchd.models.vetted.clock", lambda: changed + 1)
    memory.keep(spec, FOOTPRINT)
    assert records(tmp_path) == []


@pytest.mark.parametrize("kind", ["nfs4", "fuse.sshfs", "9p", "cifs", None])
def test_a_file_whose_times_another_machine_tells_is_not_remembered(
    memory: Vetted, spec: ModelSpec, tmp_path: Path, kind: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vetted, "_filesystem_of", lambda device: kind)
    memory.keep(spec, FOOTPRINT)
    assert records(tmp_path) == []


def test_a_filesystem_is_told_by_its_device() -> None:
    assert vetted._filesystem_of(Path("/proc").stat().st_dev) == "proc"
    assert vetted._filesystem_of(os.makedev(4000, 4000)) is None


@pytest.mark.parametrize("content", ["", "[]", "{", '{"weights": 1}'])
def test_a_record_that_says_nothing_is_none(memory: Vetted, spec: ModelSpec, tmp_path: Path, content: str) -> None:
    memory.keep(spec, FOOTPRINT)
    [record] = records(tmp_path)
    record.write_text(content)
    assert memory.take(spec) is None


def test_a_record_that_others_could_have_written_is_none(memory: Vetted, spec: ModelSpec, tmp_path: Path) -> None:
    memory.keep(spec, FOOTPRINT)
    [record] = records(tmp_path)
    assert record.stat().st_mode & 0o777 == 0o600
    record.chmod(0o666)
    assert memory.take(spec) is None


def test_only_so_many_are_kept(memory: Vetted, spec: ModelSpec, tmp_path: Path) -> None:
    for slots in range(1, vetted.MOST_RECORDS + 4):
        memory.keep(dataclasses.replace(spec, slots=slots), FOOTPRINT)
    assert len(records(tmp_path)) == vetted.MOST_RECORDS
    assert all(json.loads(record.read_text()) for record in records(tmp_path))


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(spec: ModelSpec, tmp_path: Path) -> None:
    (tmp_path / "in the way").write_text("")
    memory = Vetted(BUILD, tmp_path / "in the way")
    memory.keep(spec, FOOTPRINT)
    assert memory.take(spec) is None
