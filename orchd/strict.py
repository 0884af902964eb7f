"""The strict base of structs that are read from outside, and sentences for values that do not fit one.

A sentence is made from the field's type: its range, its choices, its examples, or ``extra={"expected": …}``.
"""

from __future__ import annotations

import difflib
import re
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from orchd.errors import ConfigError


class Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of every struct that is read from outside: immutable, and an unknown field is an error."""


StrictT = TypeVar("StrictT", bound=Strict)


def fields(struct: type[Strict]) -> dict[str, Any]:
    """The type of each field, with its constraints and its description."""
    return {field.name: field.type for field in msgspec.structs.fields(struct)}


def convert_tables(data: dict[str, Any], struct: type[StrictT], where: str, *, secrets: tuple[str, ...]) -> StrictT:
    """A struct of structs from the tables of a file.

    Args:
        data: The tables.
        struct: What they should hold; its fields are structs or tuples of structs.
        where: The file, to begin an error with.
        secrets: Dotted keys whose values are never shown.

    Raises:
        ConfigError: Names the key, the value, and what would be right.
    """
    root = inspect.type_info(struct)
    if unknown := _unknown_key(data, root, at=""):
        raise ConfigError(f"{where}: {unknown}")
    try:
        return msgspec.convert(data, struct)
    except msgspec.ValidationError as error:
        place = re.search(r" - at `\$\.(.*)`$", str(error))
        key, kind, field = place[1] if place else "", root, root
        value: Any = data
        for part in re.findall(r"\w+", key):
            value, kind = value[int(part) if part.isdigit() else part], _child(kind, part)
            field = field if part.isdigit() and not isinstance(_bare(kind), inspect.StructType) else kind
        raise ConfigError(f"{where}: {_sentence(key, value, field, secret=key in secrets)}") from None


def convert_value(value: Any, kind: Any, where: str, *, secret: bool = False) -> Any:
    """One value as the type of a field; text may stand for a number.

    Raises:
        ConfigError: Begins with ``where``; shows the value unless it is secret, and says what would be right.
    """
    info = inspect.type_info(kind)
    number = isinstance(value, str) and isinstance(_bare(info), (inspect.IntType, inspect.FloatType))
    try:
        return msgspec.convert(value, kind, strict=not number)
    except msgspec.ValidationError:
        raise ConfigError(_sentence(where, value, info, secret=secret)) from None


def _unknown_key(table: dict[str, Any], kind: inspect.Type, *, at: str, top: inspect.Type | None = None) -> str:
    """A sentence about the first key that no struct has and the nearest one that exists; or empty."""
    children, top = _children(kind), top or kind
    for key, value in table.items():
        if key not in children:
            homes = [f"{name}.{key}" for name, section in _children(top).items() if key in _children(section)]
            near = [f"{at}{name}" for name in difflib.get_close_matches(key, children, n=1)]
            remedy = f"did you mean {(near + homes)[0]}?" if near or homes else f"known here: {', '.join(children)}"
            return f"unknown key {at}{key if key.isidentifier() else repr(key)}; {remedy}"
        items = enumerate(value) if isinstance(value, list) else [(None, value)]
        for index, item in items if _children(children[key]) else ():
            inside = f"{at}{key}." if index is None else f"{at}{key}[{index}]."
            if isinstance(item, dict) and (found := _unknown_key(item, children[key], at=inside, top=top)):
                return found
    return ""


def _children(kind: inspect.Type) -> dict[str, inspect.Type]:
    """The fields of a struct, or of the structs in a tuple."""
    kind = _bare(kind)
    kind = _bare(kind.item_type) if isinstance(kind, inspect.VarTupleType) else kind
    return {field.name: field.type for field in kind.fields} if isinstance(kind, inspect.StructType) else {}


def _child(kind: inspect.Type, part: str) -> inspect.Type:
    bare = _bare(kind)
    if part.isdigit():
        return bare.item_type if isinstance(bare, inspect.VarTupleType) else kind
    return _children(bare)[part]


def _sentence(key: str, value: Any, kind: inspect.Type, *, secret: bool) -> str:
    text = "a table" if isinstance(value, dict) else repr(value)
    shown = "not usable" if secret else text if len(text) <= 80 else f"{text[:77]}..."
    return f"{key} is {shown}, expected {_expected(kind)}"


def _expected(kind: inspect.Type) -> str:
    """What a value of this type looks like, in words."""
    if isinstance(kind, inspect.Metadata):
        if kind.extra and "expected" in kind.extra:
            return str(kind.extra["expected"])
        examples = " or ".join(f'"{example}"' for example in (kind.extra_json_schema or {}).get("examples", ()))
        return _expected(kind.type) + (f" such as {examples}" if examples else "")
    if isinstance(kind, (inspect.IntType, inspect.FloatType)):
        noun = "a whole number" if isinstance(kind, inspect.IntType) else "a number"
        low = f"above {kind.gt:g}, at most" if kind.gt is not None else f"from {kind.ge} to"
        return f"{noun} {low} {kind.le}"
    if isinstance(kind, inspect.LiteralType):
        return " or ".join(f'"{value}"' for value in kind.values)
    if isinstance(kind, inspect.VarTupleType):
        return f"a list{' of at least one' if kind.min_length else ''}, each {_expected(kind.item_type)}"
    if isinstance(kind, inspect.UnionType):
        return " or ".join(_expected(kind) for kind in kind.types if not isinstance(kind, inspect.NoneType))
    if isinstance(kind, inspect.StructType):
        return "a table"
    return "true or false" if isinstance(kind, inspect.BoolType) else "a string"


def _bare(kind: inspect.Type) -> inspect.Type:
    while isinstance(kind, inspect.Metadata):
        kind = kind.type
    return kind
