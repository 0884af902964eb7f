"""Prompts of so many tokens, from a seed: words that are one token each in the model's vocabulary.

The vocabulary is read from the GGUF by Python, so that the client's process never loads llama.cpp.
"""

from __future__ import annotations

import functools
import random
import re
from pathlib import Path
from typing import Final

import gguf

_WORD_MARKS: Final = ("Ġ", "▁")
_WORD: Final = re.compile("[a-z]{2,8}")


class Prompts:
    """Prompts that share no prefix worth the name, the same ones for the same seed."""

    def __init__(self, model: Path, seed: str) -> None:
        self._words = one_token_words(model)
        self._random = random.Random(seed)

    def text(self, tokens: int) -> str:
        """Words that make so many tokens, a BOS that the model may add not counted."""
        return "".join(f" {word}" for word in self._random.choices(self._words, k=tokens))


@functools.cache
def one_token_words(model: Path) -> tuple[str, ...]:
    """Plain lower-case words that the vocabulary holds whole, with the space before them."""
    field = gguf.GGUFReader(model).fields["tokenizer.ggml.tokens"]
    pieces = (bytes(field.parts[index]).decode("utf-8", "replace") for index in field.data)
    words = {piece[1:] for piece in pieces if piece.startswith(_WORD_MARKS)}
    return tuple(sorted(word for word in words if _WORD.fullmatch(word)))
