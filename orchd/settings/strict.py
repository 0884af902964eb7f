"""The strict base of structs that are read from outside, and sentences for what does not fit one.

A sentence is made from the type of the field: its range, its choices, its examples, or ``extra={"expected": …}``. In a
file and on the command line the reader knows what was written, so it is shown; of a body, the field and the remedy are
enough.
"""

from __future__ import annotations

import copy
import difflib
import functools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from orchd.errors import ConfigError, InvalidParams

_type_info = functools.cache(inspect.type_info)

MOST_SHOWN = 80
"""Characters of a value or a name that are shown."""


class Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of every struct that is read from outside: immutable, and an unknown field is an error."""


StrictT = TypeVar("StrictT", bound=Strict)


def fields(struct: type[Strict]) -> dict[str, Any]:
    """The type of each field, with its constraints and its description."""
    return {field.name: field.type for field in msgspec.structs.fields(struct)}


@dataclass(frozen=True)
class Mistake:
    """Something in a file that does not fit.

    Attributes:
        key: Dotted, as in ``pools[0].slots``.
        sentence: Names the file, the key, the value, and what would be right.
    """

    key: str
    sentence: str


def convert_tables(
    data: dict[str, Any], struct: type[StrictT], where: str, *, secrets: tuple[str, ...]
) -> tuple[StrictT, list[Mistake]]:
    """A struct of structs from the tables of a file, and all mistakes in them; a key with one counts as left out.

    Args:
        data: The tables.
        struct: What they should hold; its fields are structs or tuples of structs.
        where: The file, to begin an error with.
        secrets: Dotted keys whose values are never shown.
    """
    data, root = copy.deepcopy(data), inspect.type_info(struct)
    mistakes = [Mistake(key, f"{where}: {said}") for key, said in _drop_unknown_keys(data, root, at="", top=root)]
    while True:
        try:
            return msgspec.convert(data, struct), mistakes
        except msgspec.ValidationError as error:
            _, key = _complaint(error)
            *_, outer, kind = (root, *_kinds(root, key))
            if key.endswith("]") and not _children(kind):
                kind = outer  # an item is told with its list, whose description covers it
            said = _sentence(key, _take(data, key), kind, secret=key in secrets)
            mistakes.append(Mistake(key, f"{where}: {said}"))


def _take(data: dict[str, Any], key: str) -> Any:
    """A key's value, and the key is gone, or for an item of a list the key of that."""
    value: Any = data
    table, name = data, ""
    for part in _parts(key):
        if isinstance(part, str):
            table, name = value, part
        value = value[part]
    del table[name]
    return value


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


def explain(error: Exception, struct: object) -> InvalidParams:
    """The refusal of a JSON body that could not be decoded as a struct; names the field and what would be right.

    Args:
        error: What msgspec raised.
        struct: The struct, as `msgspec.json.Decoder.type` gives it, whose type differs from version to version.
    """
    if isinstance(error, UnicodeDecodeError):
        return InvalidParams("the body is not UTF-8; encode it as UTF-8")
    if not isinstance(error, msgspec.ValidationError):
        detail = str(error).removeprefix("JSON is malformed: ").replace("Input data was truncated", "it is truncated")
        return InvalidParams(f"the body is not JSON: {detail}; send one JSON object")
    complaint, key = _complaint(error)
    *_, kind = _kinds(_type_info(struct), key)
    begin = f"{key}: " if key else ""
    if unknown := re.fullmatch(r"Object contains unknown field `(.*)`", complaint, re.DOTALL):
        remedy = _remedy(unknown[1], _children(kind), otherwise="available")
        return InvalidParams(f"{begin}unknown field {_short(unknown[1])}; {remedy}")
    if missing := re.fullmatch(r"Object missing required field `(.*)`", complaint):
        return InvalidParams(f"{begin}{missing[1]} is required")
    if enum := re.fullmatch(r"Invalid enum value (.*)", complaint, re.DOTALL):
        return InvalidParams(f"{begin}{_short(enum[1])} is not one of {', '.join(_choices(_bare(kind)))}")
    return InvalidParams(f"{begin or 'the body: '}expected {_expected(kind, table='an object')}")


def _complaint(error: msgspec.ValidationError) -> tuple[str, str]:
    """What msgspec says, such as "Invalid UUID - at `$.task_id`", and about which key: ``task_id``."""
    complaint, _, path = str(error).partition(" - at `$")
    return complaint, path.removesuffix("`").removesuffix("[...]").removeprefix(".")  # a value of an object


def _parts(key: str) -> list[str | int]:
    return [int(part) if part.isdigit() else part for part in re.findall(r"\w+", key)]


def _kinds(kind: inspect.Type, key: str) -> Iterator[inspect.Type]:
    """The types on the way to a key, from the outermost one on."""
    yield kind
    for part in _parts(key):
        kind = _inside(kind, part)
        yield kind


def _inside(kind: inspect.Type, part: str | int) -> inspect.Type:
    """The type of a field or of an item; where there are several types, the first that has one."""
    bare = _bare(kind)
    for one in map(_bare, bare.types if isinstance(bare, inspect.UnionType) else (bare,)):
        if isinstance(one, inspect.StructType) and part in (children := _children(one)):
            return children[part]
        if isinstance(part, int) and isinstance(one, inspect.VarTupleType):
            return one.item_type
    return kind  # a value of an object


def _drop_unknown_keys(
    table: dict[str, Any], kind: inspect.Type, *, at: str, top: inspect.Type
) -> Iterator[tuple[str, str]]:
    """Take keys out that no struct has: each, with a sentence about it and the nearest one that exists."""
    children = _children(kind)
    for key, value in list(table.items()):
        if key not in children:
            homes = [f"{name}.{key}" for name, section in _children(top).items() if key in _children(section)]
            remedy = _remedy(key, children, at=at, more=homes, otherwise="available")
            del table[key]
            yield f"{at}{key}", f"unknown key {at}{key if key.isidentifier() else repr(key)}; {remedy}"
            continue
        items = enumerate(value) if isinstance(value, list) else [(None, value)]
        for index, item in items if _children(children[key]) else ():
            inside = f"{at}{key}." if index is None else f"{at}{key}[{index}]."
            if isinstance(item, dict):
                yield from _drop_unknown_keys(item, children[key], at=inside, top=top)


def _remedy(name: str, known: Iterable[str], *, at: str = "", more: Iterable[str] = (), otherwise: str) -> str:
    """The known name that was meant, or all of them."""
    near = [f"{at}{found}" for found in difflib.get_close_matches(name[:MOST_SHOWN], known, n=1)] + [*more]
    return f"did you mean {near[0]}?" if near else f"{otherwise}: {', '.join(known)}"


def _children(kind: inspect.Type) -> dict[str, inspect.Type]:
    """The fields of a struct, or of the structs in a tuple."""
    kind = _bare(kind)
    kind = _bare(kind.item_type) if isinstance(kind, inspect.VarTupleType) else kind
    return {field.name: field.type for field in kind.fields} if isinstance(kind, inspect.StructType) else {}


def _sentence(key: str, value: Any, kind: inspect.Type, *, secret: bool) -> str:
    shown = "not usable" if secret else "a table" if isinstance(value, dict) else _short(repr(value))
    return f"{key} is {shown}, expected {_expected(kind)}"


def _short(text: str) -> str:
    return text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN - 3]}..."


_NOUNS = {inspect.UUIDType: "a UUID such as 6f1c9f0e-8a53-4f0b-9d0c-3a1f5c2b7e44", inspect.BoolType: "true or false"}


def _expected(kind: inspect.Type, *, table: str = "a table") -> str:
    """What a value of this type looks like, in words."""
    if isinstance(kind, inspect.Metadata):
        if kind.extra and "expected" in kind.extra:
            return str(kind.extra["expected"])
        examples = " or ".join(f'"{example}"' for example in (kind.extra_json_schema or {}).get("examples", ()))
        return f"a string such as {examples}" if examples else _expected(kind.type, table=table)
    if isinstance(kind, (inspect.IntType, inspect.FloatType)):
        noun = "a whole number" if isinstance(kind, inspect.IntType) else "a number"
        low = f"above {kind.gt:g}, at most" if kind.gt is not None else f"from {kind.ge} to"
        return f"{noun} {low} {kind.le}"
    if isinstance(kind, inspect.StrType):
        return f"a string{_length(kind, 'character')}"
    if isinstance(kind, inspect.VarTupleType):
        return f"a list{_length(kind, 'item')}, each {_expected(kind.item_type, table=table)}"
    if isinstance(kind, inspect.UnionType):
        kinds = [kind for kind in kind.types if not isinstance(kind, inspect.NoneType)]
        return " or ".join(_expected(kind, table=table) for kind in kinds)
    return " or ".join(f'"{choice}"' for choice in _choices(kind)) or _NOUNS.get(type(kind), table)


def _length(kind: inspect.StrType | inspect.VarTupleType, noun: str) -> str:
    if kind.max_length is not None:
        return f" of {kind.min_length or 0} to {kind.max_length} {noun}s"
    return f" of at least one {noun}" if kind.min_length else ""


def _choices(kind: inspect.Type) -> list[str]:
    """The values of a type that has only a few; none of another."""
    if isinstance(kind, inspect.EnumType):
        return [str(member.value) for member in kind.cls]
    if isinstance(kind, inspect.UnionType):
        return [choice for one in kind.types for choice in _choices(one)]
    return [str(value) for value in kind.values] if isinstance(kind, inspect.LiteralType) else []


def _bare(kind: inspect.Type) -> inspect.Type:
    """A type without what is said of it, and without None beside it."""
    if isinstance(kind, inspect.Metadata):
        return _bare(kind.type)
    if isinstance(kind, inspect.UnionType) and len(kind.types) == 2 and isinstance(kind.types[1], inspect.NoneType):
        return _bare(kind.types[0])
    return kind
