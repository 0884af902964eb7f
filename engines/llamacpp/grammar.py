"""JSON Schemas that outputs are held to: compiled once for a model's vocabulary, followed token by token.

Guarantees: what a sequence may not write never gets a share of the draw, so the text is the beginning of JSON that is
valid for its schema, and all of it if the sequence ends with `stop`. Whoever sends a schema pays for it: compiling is
bounded (`native.guidance`) and happens on its own thread, and so does the look for allowed tokens, while the model
computes.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engines.api import Schema
from engines.errors import EngineError, InvalidSchema
from engines.llamacpp.json_schema import check, compiled, is_harmless
from engines.llamacpp.native.guidance import GuidanceTokenizer, Matcher
from engines.llamacpp.own_thread import NoThread, TooLong, on_own_thread
from engines.llamacpp.schema_vet import STACK_BYTES, TIME_LIMIT_S, too_much, vet

Ids = npt.NDArray[np.intp]

SPELLED_CHARS = 512
"""Of a text without a choice that are turned into tokens at once: a constant may have 64 KiB."""

MOST_LEFT_BEHIND = 2
"""Compilations that may go on although nobody waits for them any more: each takes a processor."""

MOST_FORCED = 32
"""Tokens that `Follower.forced` tells."""


class Grammars:
    """Compiles schemas for one vocabulary, which is read when the first one comes. Any thread.

    Args:
        name: The model's, for messages.
        pieces: Reads the bytes of every token, None or nothing for one that stands for no text.
        ends: The tokens that end the generation.
        spell: The tokens of a text that goes on where another ended. Raises `EngineError` once it can no more.
    """

    def __init__(
        self,
        name: str,
        pieces: Callable[[], Seq[bytes | None]],
        ends: Seq[int],
        spell: Callable[[str], Seq[int]] | None = None,
    ) -> None:
        self._name = name
        self._pieces = pieces
        self._ends = ends
        self._spell = spell
        self._lock = threading.Lock()
        self._tokenizer: GuidanceTokenizer | None = None
        self._left_behind: list[threading.Thread] = []

    def compile(self, schema: Schema) -> Grammar:
        """See `engines.api.Vocab.grammar`."""
        tokenizer = self._open()
        plain = {"type": "object"} if schema is True else schema
        check(plain)
        if not is_harmless(plain):
            vet(plain)
        return Grammar(self._in_time(lambda: compiled(plain, tokenizer)))

    def _in_time(self, compilation: Callable[[], Matcher]) -> Matcher:
        """What it returns; it should be short, and cannot be stopped if it is not."""
        self._left_behind = [thread for thread in self._left_behind if thread.is_alive()]
        if len(self._left_behind) >= MOST_LEFT_BEHIND:
            raise InvalidSchema("#: no schema can be compiled, because earlier ones still are; try again later")
        try:
            return on_own_thread("schema", compilation, stack_bytes=4 * STACK_BYTES, limit_s=TIME_LIMIT_S)
        except TooLong as error:
            self._left_behind.append(error.thread)
            raise too_much() from None
        except NoThread:
            raise InvalidSchema("#: the machine has no memory left to compile the schema; try again later") from None

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
                spelling = None if self._spell is None else Spelling(tokens, self._spell)
                self._tokenizer = GuidanceTokenizer(tokens, ends=self._ends, tokenize=spelling)
            return self._tokenizer


class Spelling:
    """How a model writes what a schema leaves no choice about. Any thread.

    Args:
        tokens: The bytes of each token.
        spell: See `Grammars`; its tokens are used if they are the text to the byte, and else the longest that fit.
    """

    def __init__(self, tokens: Seq[bytes], spell: Callable[[str], Seq[int]]) -> None:
        self._tokens = tokens
        self._spell = spell

    def __call__(self, data: bytes) -> Seq[int]:
        """The first tokens of a text in UTF-8, all of them if it is not long."""
        text = data.decode()[:SPELLED_CHARS]
        try:
            tokens = self._spell(text)
        except EngineError:  # the vocabulary is closed: a reload lets running sequences finish
            tokens = ()
        data = text.encode()
        return tokens if b"".join(self._tokens[token] for token in tokens) == data else list(self._greedy(data))

    def _greedy(self, data: bytes) -> Iterator[int]:
        begin = 0
        while begin < len(data):
            ends = range(min(len(data), begin + self._longest), begin, -1)
            end = next((end for end in ends if data[begin:end] in self._ids), None)
            if end is None:
                return
            yield self._ids[data[begin:end]]
            begin = end

    @functools.cached_property
    def _ids(self) -> Mapping[bytes, int]:
        return {piece: token for token, piece in enumerate(self._tokens)}

    @functools.cached_property
    def _longest(self) -> int:
        return max(map(len, self._tokens))


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
        threads: The one thread on which the allowed tokens are looked for.
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
        self._forced: Seq[int] = ()
        self._next: Future[Allowed] = Future()
        self._look_ahead()

    def forced(self) -> Seq[int]:
        """The tokens that come next whatever the model makes of it; the first of them are told if there are many."""
        return self._forced

    def allowed(self) -> Allowed:
        """What may come next; waits for it.

        Raises:
            InvalidSchema: To find it would cost more than is allowed, or it is nothing.
        """
        return self._next.result()

    def take(self, *tokens: int) -> bool:
        """Go on by allowed tokens; returns whether the text is complete and can only end. Raises `InvalidSchema`."""
        for token in tokens:
            self._matcher.take(token)
        kept = list(self._forced[: len(tokens)]) == list(tokens)
        return self._matcher.stopped or self._look_ahead(self._forced[len(tokens) :] if kept else ())

    def _look_ahead(self, forced: Seq[int] = ()) -> bool:
        """Find out what is forced, unless some of it is known yet, and have what may come next looked for."""
        self._forced = forced or self._matcher.forced(MOST_FORCED)
        if self._forced:
            self._next = Future()
            self._next.set_result(Allowed(np.array(self._forced[:1], np.intp)))
        else:
            self._next = self._threads.submit(self._look)
        return False

    def _look(self) -> Allowed:
        matcher = self._matcher
        bits = np.unpackbits(matcher.mask().view(np.uint8), count=matcher.n_vocab, bitorder="little").view(bool)
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
