"""Pure: how long a template's values are, and which lengths are refused.

All are in characters, with `ITEM_CHARS` for each item of a list.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, Final, NoReturn, TypeVar

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
    chars, level = _looked_at([value], 1, {})
    while level and chars <= MAX_CHARS:
        more, level = _level(level, room=MAX_CHARS - chars)
        chars += more
    return chars


_Level = dict[int, tuple[Any, int]]
"""Collections at one depth, by identity, and how often each is there: a hundred of them that each hold the one before
twice would be 2**100."""


def _level(level: _Level, *, room: int) -> tuple[int, _Level]:
    """Characters of these collections, and what is inside of them; counted no further than a little over ``room``."""
    chars = 0
    inside: _Level = {}
    for value, times in level.values():
        chars += times * ITEM_CHARS * len(value)
        if chars > room:
            break
        for items in (value, value.values()) if isinstance(value, dict) else (value,):
            more, inside = _looked_at(items, times, inside)
            chars += more
    return chars, inside


def _looked_at(values: Iterable[object], times: int, inside: _Level) -> tuple[int, _Level]:
    """Characters of values that are there so many times; collections among them are added to the others."""
    chars = 0
    for value in values:
        if isinstance(value, jinja2.utils.Namespace):
            value = object.__getattribute__(value, "_Namespace__attrs")
        if isinstance(value, str):
            chars += times * len(value)
        elif isinstance(value, int):
            chars += times * value.bit_length()
        elif isinstance(value, (list, tuple, dict)) or _is_collection(value):
            _, before = inside.get(id(value), (value, 0))
            inside[id(value)] = value, before + times
        else:
            chars += times
    return chars, inside


def _is_collection(value: object) -> bool:
    """Whether it is one of other types, such as a `range`."""
    return isinstance(value, Collection) and not isinstance(value, jinja2.runtime.Context)  # which has no length


def depth(value: object) -> int:
    """How many levels are inside of each other in what `size` lets pass."""
    levels = 1
    _, level = _looked_at([value], 1, {})
    while level:
        _, level = _level(level, room=MAX_CHARS)
        levels += 1
    return levels
