"""Pure: how long a template's values are, and which lengths are refused.

All are in characters, with `ITEM_CHARS` for each item of a list.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Final, NoReturn, TypeVar

import jinja2.runtime
import jinja2.utils

from engines.errors import InvalidPrompt

MAX_CHARS = 16 * 2**20
"""Longest text that an operation may make, in characters."""

ITEM_CHARS: Final = 16

T = TypeVar("T")


def refuse() -> NoReturn:
    """Raise `InvalidPrompt`."""
    raise InvalidPrompt(
        f"the model's chat template makes texts of more than {MAX_CHARS} characters, or huge numbers; "
        "send prompt instead"
    )


def limit(chars: int) -> None:
    """Refuse a length."""
    if chars > MAX_CHARS:
        refuse()


def checked(value: T) -> T:
    """A value that is not too long; else refused."""
    if not isinstance(value, str) or len(value) > MAX_CHARS:
        limit(size(value))
    return value


def size(value: object) -> int:
    """Characters of a value written out, roughly; what is in it twice counts twice.

    Stops counting once it is too much, so that no nesting takes long.
    """
    if isinstance(value, str):
        return len(value)
    chars, level = 0, [value]
    while level and chars <= MAX_CHARS:
        chars, level = _level(chars, level)
    return chars


def _level(chars: int, values: Iterable[object]) -> tuple[int, list[object]]:
    """One level of nesting added to ``chars``, and what is inside of it."""
    inside: list[object] = []
    for value in values:
        if isinstance(value, jinja2.utils.Namespace):
            value = object.__getattribute__(value, "_Namespace__attrs")
        if isinstance(value, str):
            chars += len(value)
        elif isinstance(value, int):
            chars += value.bit_length()
        elif isinstance(value, (list, tuple, dict)) or _is_collection(value):
            chars += ITEM_CHARS * len(value)  # type: ignore[arg-type]  # it has one
            if chars > MAX_CHARS:
                break
            inside += value  # type: ignore[arg-type]  # likewise
            if isinstance(value, dict):
                inside += value.values()
        else:
            chars += 1
    return chars, inside


def _is_collection(value: object) -> bool:
    """Whether it is one of other types, such as a `range`."""
    return isinstance(value, Collection) and not isinstance(value, jinja2.runtime.Context)  # which has no length


def depth(value: object) -> int:
    """How many levels are inside of each other in what `size` lets pass."""
    levels, level = 0, [value]
    while level:
        _, level = _level(0, level)
        levels += 1
    return levels
