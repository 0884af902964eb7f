"""JSON Schemas that outputs are held to: compiled once for a model's vocabulary, followed token by token.

Guarantees: what a sequence may not write never gets a share of the draw, so the text is the beginning of JSON that is
valid for its schema, and all of it if the sequence ends with `stop`. Whoever sends a schema pays for it: compiling is
bounded (`native.guidance`) and happens on its own thread, and so does the look for allowed tokens, while the model
computes.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from engines.errors import InvalidSchema
from engines.llamacpp.native.guidance import GuidanceTokenizer, Matcher

Ids = npt.NDArray[np.intp]
Schema = Mapping[str, Any] | Literal[True]

MAX_BYTES = 64 * 1024
"""Of a schema as JSON."""
MAX_DEPTH = 50
"""Objects and arrays inside one another in a schema."""
MAX_TRIES = 64
"""Parts of a schema that are compiled by themselves to find the one that is not supported."""
LARGE = 8 * 1024
"""Bytes of a schema from which on nobody looks for that part."""

STYLE = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False, "lenient": False}
"""On one line, as most JSON is that models learnt from; a model that may write blanks can write them for ever."""


class Grammars:
    """Compiles schemas for one vocabulary, which is read when the first one comes. Any thread.

    Args:
        name: The model's, for messages.
        pieces: Reads the bytes of every token, None or nothing for one that stands for no text.
        ends: The tokens that end the generation.
    """

    def __init__(self, name: str, pieces: Callable[[], Seq[bytes | None]], ends: Seq[int]) -> None:
        self._name = name
        self._pieces = pieces
        self._ends = ends
        self._lock = threading.Lock()
        self._tokenizer: GuidanceTokenizer | None = None

    def compile(self, schema: Schema) -> Grammar:
        """See `engines.api.Vocab.grammar`."""
        text = _checked({"type": "object"} if schema is True else schema)
        tokenizer = self._open()
        try:
            grammar = Grammar(tokenizer.matcher(text))
            if not grammar.begin().mask().any():
                raise InvalidSchema("no JSON is valid for it")
            return grammar
        except InvalidSchema as error:
            place = _place(tokenizer, schema, error) if schema is not True and len(text) < LARGE else "#"
            raise InvalidSchema(f"{place}: {_plain(error)}") from None

    def _open(self) -> GuidanceTokenizer:
        with self._lock:
            if self._tokenizer is None:
                pieces = self._pieces()
                missing = set(map(chr, range(0x20, 0x7F))) - {
                    chr(piece[0]) for piece in pieces if piece and len(piece) == 1
                }
                if missing or not self._ends:
                    lack = f"no token for {min(missing)!r}" if missing else "no token that ends a text"
                    raise InvalidSchema(f"{self._name} cannot write JSON: its vocabulary has {lack}")
                tokens = [piece or b"\xff%d" % token for token, piece in enumerate(pieces)]
                self._tokenizer = GuidanceTokenizer(tokens, ends=self._ends)
            return self._tokenizer


class Grammar:
    """A compiled schema, for sequences on models with the vocabulary that it was compiled for."""

    def __init__(self, matcher: Matcher) -> None:
        self._matcher = matcher

    def begin(self) -> Matcher:
        """A text that is still empty."""
        return self._matcher.copy()


@dataclass(frozen=True)
class Allowed:
    """The tokens that may come next: those in ``few``, or where that is None all that are not ``barred``."""

    few: Ids | None
    barred: Ids | None = None


class Follower:
    """How far one sequence has come in its schema. The thread that steps its model.

    Args:
        grammar: The schema.
        threads: Where the allowed tokens are looked for.
        ends: The tokens that end the generation.
        most: The number of tokens up to which they are given as ``few``.
        to_the_end: Not to end before nothing else is allowed.
    """

    def __init__(
        self, grammar: Grammar, threads: ThreadPoolExecutor, *, ends: Seq[int], most: int, to_the_end: bool = False
    ) -> None:
        self._threads = threads
        self._ends = np.array(ends, np.intp)
        self._most = most
        self._to_the_end = to_the_end
        self._matcher = grammar.begin()
        self._next: Future[Allowed] = threads.submit(self._look)

    def allowed(self) -> Allowed:
        """What may come next; waits for it. Raises `InvalidSchema` if that costs more than is allowed, or is nothing."""
        return self._next.result()

    def take(self, token: int) -> bool:
        """Go on by an allowed token; returns whether the text is complete and can only end. Raises `InvalidSchema`."""
        self._matcher.take(token)
        if self._matcher.stopped:
            return True
        self._next = self._threads.submit(self._look)
        return False

    def _look(self) -> Allowed:
        bits = np.unpackbits(self._matcher.mask().view(np.uint8), bitorder="little").view(bool)
        if self._to_the_end:
            ends, bits[self._ends] = bits[self._ends], False
            if not bits.any():
                bits[self._ends] = ends
        count = int(np.count_nonzero(bits))
        if not count:
            raise InvalidSchema("this model's vocabulary cannot write what has to come next")
        if count <= self._most:
            return Allowed(np.flatnonzero(bits))
        return Allowed(None, np.flatnonzero(~bits))


def _checked(schema: Mapping[str, Any]) -> str:
    """A schema as llguidance takes it. Raises `InvalidSchema` if it is too large or too deep."""
    level: list[Any] = [schema]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, Mapping) else node)
            if isinstance(child, (Mapping, list, tuple))
        ]
        if not level:
            break
    else:
        raise InvalidSchema(
            f"#: more than {MAX_DEPTH} objects and arrays are inside one another; send a flatter schema"
        )
    text = json.dumps({**schema, "x-guidance": STYLE}, ensure_ascii=False)
    if len(text.encode()) > MAX_BYTES:
        raise InvalidSchema(f"#: the schema has more than {MAX_BYTES} bytes; send a smaller one")
    return text


def _place(tokenizer: GuidanceTokenizer, schema: Mapping[str, Any], error: InvalidSchema) -> str:
    """A JSON pointer to the innermost part of a schema that fails in the same way by itself."""
    shared = {key: schema[key] for key in ("$defs", "definitions", "$schema") if key in schema}
    place, node, tries = "#", schema, 0
    while True:
        for path, child in _parts(node):
            tries += 1
            if tries > MAX_TRIES:
                return place
            try:
                tokenizer.matcher(json.dumps({**shared, **child, "x-guidance": STYLE}))
            except InvalidSchema as again:
                if str(again) == str(error):
                    place, node = f"{place}/{path}", child
                    break
        else:
            return place


def _parts(node: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The schemas directly inside a schema, with the way to each."""
    parts: list[tuple[str, Mapping[str, Any]]] = []
    for key, value in node.items():
        name = _escaped(key)
        if key in ("properties", "patternProperties", "$defs", "definitions") and isinstance(value, Mapping):
            parts += [(f"{name}/{_escaped(each)}", part) for each, part in value.items() if isinstance(part, Mapping)]
        elif key in ("items", "additionalProperties", "additionalItems", "not") and isinstance(value, Mapping):
            parts.append((name, value))
        elif key in ("anyOf", "oneOf", "allOf", "prefixItems", "items") and isinstance(value, (list, tuple)):
            parts += [(f"{name}/{index}", part) for index, part in enumerate(value) if isinstance(part, Mapping)]
    return parts


def _escaped(key: str) -> str:
    return key[:64].replace("~", "~0").replace("/", "~1")


def _plain(error: InvalidSchema) -> str:
    """What llguidance says, in one sentence of bearable length."""
    text = str(error)
    for said, plain in _WORDS:
        text = text.replace(said, plain)
    return text if len(text) <= 300 else f"{text[:297]}..."


_WORDS = (
    ("Unimplemented keys:", "not supported:"),
    (
        "oneOf constraints are not supported. Enable 'coerce_one_of' option to approximate oneOf with anyOf",
        "oneOf is supported only where no value can match two of its schemas; use anyOf",
    ),
    ("initial lexer configuration (grammar) too big", "the schema is too complex; make it smaller"),
    ("schema too large", "the schema is too complex; make it smaller"),
)
