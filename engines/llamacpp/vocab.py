"""A model's vocabulary: text to tokens, and tokens to bytes."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from engines.api import NO_ARGUMENTS, Prompt, Schema, TemplateArgument
from engines.errors import EngineDead, InvalidPrompt
from engines.llamacpp.channels import Style
from engines.llamacpp.chat import ChatTemplate
from engines.llamacpp.grammar import Grammar, Grammars
from engines.llamacpp.model_template import open_template, reason, reasoning_style
from engines.llamacpp.native.model import NativeModel
from engines.llamacpp.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

THINKING = tuple(b"<think> <thinking> <thought> <seed:think> [THINK] <|channel>thought <|START_THINKING|>".split())
"""What opens a model's thoughts."""


class LlamaVocab:
    """Tokenizer and chat template of a GGUF, without its weights.

    It has a handle of its own, so that no thread ever reaches into a model that another one steps. Calls run side by
    side; `close` leaves the freeing to the last of those that are under way. A chat template that cannot work is a
    warning in the log, now and not at the first conversation.

    Raises:
        LoadFailed: The file has no vocabulary that llama.cpp can read.
    """

    def __init__(self, path: Path) -> None:
        self._native = NativeModel(path, vocab_only=True)
        self._lock = threading.Lock()
        self._calls = 0
        self._closed = False
        self._tokenizer = Tokenizer(self._native)
        self._style = reasoning_style(self._native)
        self._grammars = Grammars(path.name, self._all_pieces, list(self._native.ends), self._spell)
        self._template: ChatTemplate | None = None
        self._no_chat = ""
        try:
            self._template = open_template(self._native)
        except InvalidPrompt as error:
            self._no_chat = str(error)
            _log.warning("%s: %s", path.name, reason(error))

    def tokenize(self, prompt: str, *, at_most: int | None = None) -> list[int]:
        """See `engines.api.Vocab`."""
        return self._tokenize(prompt, (), at_most)

    def tokenize_chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        arguments: Mapping[str, TemplateArgument] = NO_ARGUMENTS,
        at_most: int | None = None,
    ) -> Prompt:
        """See `engines.api.Vocab`."""
        if self._template is None:
            raise InvalidPrompt(self._no_chat)
        prompt = self._template.render(messages, arguments=arguments)
        reply = "" if self._style is None else self._style.begun(prompt.head, prompt.continued)
        return Prompt(self._tokenize(prompt.text, prompt.cuts, at_most), reply)

    def grammar(self, schema: Schema) -> Grammar:
        """See `engines.api.Vocab`."""
        with self._open():
            return self._grammars.compile(schema)

    def opens_thinking(self, tokens: Sequence[int]) -> bool:
        """See `engines.api.Vocab`."""
        if self._style is not None:
            return False
        with self._open():
            tail = b"".join(self._native.piece(token, special=True) for token in tokens[-8:])
        return tail.rstrip().endswith(THINKING)

    def _all_pieces(self) -> list[bytes | None]:
        pieces: list[bytes | None] = [*self._native.pieces()]
        for token in (*self._native.ends, *self._native.controls):
            pieces[token] = None
        return pieces

    def _spell(self, text: str) -> list[int]:
        with self._open():
            return self._tokenizer.spell(text)

    @contextlib.contextmanager
    def _open(self) -> Iterator[None]:
        with self._lock:
            if self._closed:
                raise EngineDead(f"the vocabulary of {self._native.name} is closed")
            self._calls += 1
        try:
            yield
        finally:
            with self._lock:
                self._calls -= 1
                if self._closed and not self._calls:
                    self._native.close()

    def _tokenize(self, text: str, cuts: Iterable[int], at_most: int | None) -> list[int]:
        with self._open():
            tokens = self._tokenizer.tokenize(text, cuts, at_most=at_most)
        if not tokens:
            raise InvalidPrompt("the prompt has no tokens for this model; send at least one token of text")
        return tokens

    def close(self) -> None:
        """See `engines.api.Vocab`."""
        with self._lock:
            self._closed = True
            if not self._calls:
                self._native.close()


class Piece(NamedTuple):
    """What a token stands for.

    Attributes:
        data: Its bytes.
        shown: Whether they are shown: they are, but for control tokens that do not mark reasoning.
        special: Whether a text that spells the token always becomes it.
    """

    data: bytes
    shown: bool
    special: bool


class Pieces(dict[int, "Piece | None"]):
    """Token to what it stands for, None for one that ends the generation. Filled as tokens come up.

    Args:
        native: The model that has them.
        style: How it marks its reasoning.
    """

    def __init__(self, native: NativeModel, style: Style | None) -> None:
        super().__init__()
        self._native = native
        self._marks = () if style is None else style.tokens
        self.ends = native.ends
        """Every token that ends the generation; looked for now, because it would hold up a step (0.3 µs a token)."""

    def __missing__(self, token: int) -> Piece | None:
        native = self._native
        piece = None
        if token not in self.ends:
            shown = not native.is_control(token) or native.text(token) in self._marks
            piece = Piece(native.piece(token, special=True), shown, native.is_special(token))
        self[token] = piece
        return piece
