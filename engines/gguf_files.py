"""Which files a GGUF model is made of: one, or the numbered parts that ``llama-gguf-split`` writes."""

from __future__ import annotations

import re
from pathlib import Path

SUFFIX = ".gguf"
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


def parts(path: Path) -> tuple[Path, ...]:
    """The files of a model, given its first one; a model that is not split has one."""
    split = split_of(path.name)
    if split is None:
        return (path,)
    stem, _, total = split
    return tuple(path.with_name(part_name(stem, part, total)) for part in range(1, total + 1))


def split_of(name: str) -> tuple[str, int, int] | None:
    """Stem, part and number of parts, if this is the name of a part of a split model."""
    match = _SPLIT.search(name)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        return None
    return name[: match.start()], int(match[1]), int(match[2])


def part_name(stem: str, part: int, total: int) -> str:
    """What a part of a split model is called."""
    return f"{stem}-{part:05}-of-{total:05}{SUFFIX}"
