"""A model's vocabulary: text to tokens, and tokens to bytes."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from engines.errors import EngineDead, InvalidPrompt
from engines.llamacpp.chat import ChatTemplate
from engines.llamacpp.native.model import NativeModel
from engines.llamacpp.spelling import Cuts


class LlamaVocab:
    """Tokenizer and chat template of a GGUF, without its weights.

    It has a handle of its own, so that no thread ever reaches into a model that another one steps. Calls run side by
    side; `close` leaves the freeing to the last of those that are under way.

    Raises:
        LoadFailed: The file has no vocabulary that llama.cpp can read.
    """

    def __init__(self, path: Path) -> None:
        self._native = NativeModel(path, vocab_only=True)
        self._lock = threading.Lock()
        self._calls = 0
        self._closed = False
        self._template: ChatTemplate | None = None
        special = (token for token in range(self._native.n_vocab) if self._native.is_special(token))
        self._cuts = Cuts({self._text(token): self._native.swallows_blanks(token) for token in special})

    def tokenize(self, prompt: str) -> list[int]:
        """See `engines.api.Vocab`."""
        return self._tokenize([prompt])

    def tokenize_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """See `engines.api.Vocab`."""
        with self._open():
            if self._template is None:
                self._template = self._compile_template()
            return self._tokenize(self._template.render(messages))

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

    def _tokenize(self, parts: Sequence[str]) -> list[int]:
        with self._open():
            try:
                tokens: list[int] = []
                for number, piece in enumerate(piece for part in parts for piece in self._pieces(part)):
                    tokens += self._native.tokenize(piece, add_special=number == 0, parse_special=True)
            except UnicodeEncodeError:
                raise InvalidPrompt(
                    "the text contains half a surrogate pair, which is not Unicode; remove it"
                ) from None
            bos = self._native.bos
        if len(tokens) > 1 and tokens[0] == tokens[1] == bos:
            del tokens[0]  # the tokenizer added one and the text, or the template, had one
        if not tokens:
            raise InvalidPrompt("the prompt has no tokens for this model; send at least one token of text")
        return tokens

    def _pieces(self, text: str) -> Iterable[str]:
        return [text] if self._native.adds_eos else self._cuts.pieces(text)

    def _compile_template(self) -> ChatTemplate:
        source = self._native.chat_template
        if source is None:
            raise InvalidPrompt(f"{self._native.name} has no chat template; send prompt instead of messages")
        native = self._native
        controls = (self._text(token) for token in range(native.n_vocab) if native.is_control(token))
        return ChatTemplate(source, bos=self._text(native.bos), eos=self._text(native.eos), controls=controls)

    def _text(self, token: int) -> str:
        """What spells a token; nothing for -1, which is none."""
        return self._native.piece(token, special=True).decode("utf-8", "replace") if token >= 0 else ""

    def close(self) -> None:
        """See `engines.api.Vocab`."""
        with self._lock:
            self._closed = True
            if not self._calls:
                self._native.close()


class Pieces(dict[int, "bytes | None"]):
    """Token to the bytes it stands for, None for one that ends the generation. Filled as tokens come up."""

    def __init__(self, native: NativeModel) -> None:
        super().__init__()
        self._native = native
        self.ends = tuple(token for token in range(native.n_vocab) if native.is_end(token))
        """Every token that ends the generation; looked for now, because it would hold up a step (0.3 µs a token)."""

    def __missing__(self, token: int) -> bytes | None:
        piece = None if token in self.ends else self._native.piece(token, special=False)
        self[token] = piece
        return piece
