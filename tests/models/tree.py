"""Files that look like models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

HEADER = b"GGUF" + (3).to_bytes(4, "little") + bytes(16)


def put(path: Path, content: bytes = HEADER) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def put_split(folder: Path, stem: str, total: int, *, without: Sequence[int] = ()) -> Path:
    for part in range(1, total + 1):
        if part not in without:
            put(folder / f"{stem}-{part:05}-of-{total:05}.gguf")
    return folder / f"{stem}-00001-of-{total:05}.gguf"
