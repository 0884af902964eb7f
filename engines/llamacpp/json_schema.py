"""JSON Schemas before anybody is held to them: how large they may be, and which part of one is not supported."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from engines.errors import InvalidSchema
from engines.llamacpp.native.guidance import GuidanceTokenizer, Matcher

MAX_BYTES = 64 * 1024
"""Of a schema as JSON."""

MAX_DEPTH = 50
"""Objects and arrays inside one another in a schema."""

MAX_TRIES = 64
"""Parts of a schema that are compiled by themselves to find the one that is not supported."""

SMALL_BYTES = 8 * 1024
"""Schemas up to this size are harmless if they have none of the keywords below: compiling one goes no deeper than its
length, and takes a twentieth of a second at most."""

COSTLY = frozenset({"allOf", "multipleOf", "pattern", "patternProperties"})
"""Keywords whose regular expressions may be combined, which can take any time and memory."""

_STYLE = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False, "lenient": False}
"""On one line, as much JSON is that models learnt from. Where blanks are free, a model may write them without end."""

_PLAINER = {
    "Unimplemented keys:": "not supported:",
    "oneOf constraints are not supported. Enable 'coerce_one_of' option to approximate oneOf with anyOf": (
        "oneOf is supported only where no value can match two of its schemas; use anyOf"
    ),
    "initial lexer configuration (grammar) too big": "it is too complex",
    "schema too large": "it is too complex",
    "NoExtensionBias": "no JSON is valid for it",
    "Unable to determine if regex is empty": "it takes too much time or memory to find out what its patterns allow",
}


def check(schema: Mapping[str, Any]) -> None:
    """Raise `InvalidSchema` if a schema is too large or too deep to be looked at any further, or has long integers."""
    level: list[Any] = [schema]
    members = 0
    for _ in range(MAX_DEPTH):
        members += sum(map(len, level))
        if members * 2 > MAX_BYTES:
            raise _too_large()  # without writing it out, which would hold Python's lock
        for number in filter(_is_too_long, itertools.chain.from_iterable(map(_members, level))):
            raise InvalidSchema(f"#: the integer {str(number)[:32]} would be rounded; use none beyond 2^53")
        level = [child for node in level for child in _children(node)]
        if not level:
            break
    else:
        raise InvalidSchema(f"#: over {MAX_DEPTH} objects and arrays are inside one another; send a flatter schema")
    if len(_text(schema)) > MAX_BYTES:
        raise _too_large()


def _too_large() -> InvalidSchema:
    return InvalidSchema(f"#: the schema has more than {MAX_BYTES} bytes; send a smaller one")


def is_harmless(schema: Mapping[str, Any]) -> bool:
    """Whether compiling it can take neither long nor much."""
    return len(_text(schema)) <= SMALL_BYTES and COSTLY.isdisjoint(_keys(schema))


def compiled(schema: Mapping[str, Any], tokenizer: GuidanceTokenizer) -> Matcher:
    """At the beginning of a text. Raises `InvalidSchema`, which names the place."""
    try:
        return _compiled(schema, tokenizer)
    except InvalidSchema as error:
        place = _place(schema, tokenizer, error) if len(_text(schema)) <= SMALL_BYTES else "#"
        raise InvalidSchema(f"{place}: {_plain(error)}") from None


def _compiled(schema: Mapping[str, Any], tokenizer: GuidanceTokenizer) -> Matcher:
    matcher = tokenizer.matcher(_text(schema))
    if not matcher.mask().any():
        raise InvalidSchema("no JSON is valid for it")
    return matcher


def _text(schema: Mapping[str, Any]) -> str:
    return json.dumps({**schema, "x-guidance": _STYLE})


def _members(node: Any) -> Iterable[Any]:
    return node.values() if isinstance(node, Mapping) else node


def _children(node: Any) -> list[Any]:
    return [child for child in _members(node) if isinstance(child, (Mapping, list, tuple))]


def _is_too_long(value: Any) -> bool:
    return isinstance(value, int) and abs(value) > 2**53


def _keys(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        yield from node
    for child in _children(node):
        yield from _keys(child)


def _place(schema: Mapping[str, Any], tokenizer: GuidanceTokenizer, error: InvalidSchema) -> str:
    """A JSON pointer to the innermost part of a schema that fails in the same way by itself."""
    shared = {key: schema[key] for key in ("$defs", "definitions", "$schema") if key in schema}
    place, node, tries = "#", schema, 0
    while True:
        for path, part in _parts(node):
            tries += 1
            if tries > MAX_TRIES:
                return place
            try:
                _compiled({**shared, **part}, tokenizer)
            except InvalidSchema as again:
                if str(again) == str(error):
                    place, node = f"{place}/{path}", part
                    break
        else:
            return place


def _parts(node: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The schemas directly inside a schema, with the way to each."""
    for key, value in node.items():
        named = key in ("properties", "patternProperties", "$defs", "definitions")
        if isinstance(value, Mapping) and not named:
            yield _escaped(key), value
            continue
        parts = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
        for name, part in parts:
            if isinstance(part, Mapping):
                yield f"{_escaped(key)}/{_escaped(str(name))}", part


def _escaped(key: str) -> str:
    return key[:64].replace("~", "~0").replace("/", "~1")


def _plain(error: InvalidSchema) -> str:
    """What llguidance says, in other words where these are clearer, and of bearable length."""
    text = str(error)
    for said, plainer in _PLAINER.items():
        if said in text:
            text = plainer if said.startswith("Unable") else text.replace(said, plainer)
    return text if len(text) <= 300 else f"{text[:297]}..."
