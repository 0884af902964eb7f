"""JSON Schemas that outputs are held to: compiled once for a model's vocabulary, followed token by token.

Guarantees: what a sequence may not write never gets a share of the draw, so the text is the beginning of JSON that is
valid for its schema, and all of it if the sequence ends with `stop`. Whoever sends a schema pays for it: compiling is
bounded (`native.guidance`) and happens on its own thread, and so does the look for allowed tokens, while the model
computes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engines.api import Schema
from engines.errors import InvalidSchema
from engines.llamacpp.json_schema import check, compiled, is_harmless
from engines.llamacpp.native.guidance import GuidanceTokenizer, Matcher
from engines.llamacpp.schema_vet import vet

Ids = npt.NDArray[np.intp]


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
        tokenizer = self._open()
        plain = {"type": "object"} if schema is True else schema
        check(plain)
        if not is_harmless(plain):
            vet(plain)
        return Grammar(compiled(plain, tokenizer))

    def _open(self) -> GuidanceTokenizer:
        with self._lock:
            if self._tokenizer is None:
                pieces = self._pieces()
                alone = {piece for piece in pieces if piece and len(piece) == 1}
                missing = [chr(byte) for byte in range(0x20, 0x7F) if bytes([byte]) not in alone]
                if missing or not self._ends:
                    lack = f"no token for {missing[0]!r}" if missing else "no token that ends a text"
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
        """What may come next; waits for it.

        Raises:
            InvalidSchema: To find it would cost more than is allowed, or it is nothing.
        """
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
