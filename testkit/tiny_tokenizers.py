"""GGUF files that hold a tokenizer and nothing else, of the kinds that llama.cpp knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from gguf import GGUFWriter, TokenType

CONTROL, USER_DEFINED, NORMAL = TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.NORMAL


def write_bpe(
    path: Path,
    *,
    pre: str = "default",
    more: Mapping[str, TokenType] | None = None,
    words: Sequence[str] = ("ab", "abab", "aa", "aaaa"),
    chat_template: str | None = None,
    add_bos: bool = False,
    add_eos: bool = False,
) -> Path:
    """A byte-level BPE vocabulary. Its first tokens are ``<s>`` and ``</s>``.

    Args:
        path: Where to.
        pre: What llama.cpp calls the rules by which texts are cut into words.
        more: Further tokens, with their types.
        words: Normal tokens of more than one byte; each can be split in halves that are tokens.
        chat_template: None leaves the key out.
        add_bos: Whether prompts should begin with ``<s>``.
        add_eos: Whether they should end with ``</s>``.
    """
    special = {"<s>": CONTROL, "</s>": CONTROL, **(more or {})}
    letters = [*"!\"#$%&'()*+,-./0123456789:;<=>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[\\]^_`abcdefghijklmnopqrstuvwxyz{|}~"]
    letters += [chr(code) for code in (*range(0xA1, 0xAD), *range(0xAE, 0x100), *range(0x100, 0x144))]
    file = _Tokenizer(path, "gpt2", {**special, **dict.fromkeys([*letters, *words], NORMAL)})
    file.writer.add_tokenizer_pre(pre)
    file.writer.add_token_merges([f"{word[: len(word) // 2]} {word[len(word) // 2 :]}" for word in words])
    return file.finish(bos=0, eos=1, add_bos=add_bos, add_eos=add_eos, chat_template=chat_template)


def write_sentencepiece(
    path: Path,
    *,
    more: Mapping[str, TokenType] | None = None,
    words: Sequence[str] = ("▁", "a", "b", "▁a", "▁b", "ab", "▁ab", "▁▁"),
    chat_template: str | None = None,
    add_bos: bool = False,
    add_eos: bool = False,
    add_space_prefix: bool = True,
) -> Path:
    """A SentencePiece vocabulary that falls back to bytes. Its first tokens are ``<s>`` and ``</s>``.

    Args:
        path: Where to.
        more: Further tokens, with their types.
        words: Normal tokens, the first of two that could be merged first.
        chat_template: None leaves the key out.
        add_bos: Whether prompts should begin with ``<s>``.
        add_eos: Whether they should end with ``</s>``.
        add_space_prefix: Whether a text gets a space in front of it.
    """
    bytes_ = {f"<0x{byte:02X}>": TokenType.BYTE for byte in range(256)}
    special = {"<s>": CONTROL, "</s>": CONTROL, **(more or {}), **bytes_}
    file = _Tokenizer(path, "llama", {**special, **dict.fromkeys(words, NORMAL)})
    file.writer.add_token_scores([0.0] * len(special) + [-float(rank) for rank in range(len(words))])
    file.writer.add_add_space_prefix(add_space_prefix)
    return file.finish(bos=0, eos=1, add_bos=add_bos, add_eos=add_eos, chat_template=chat_template)


def write_unigram(path: Path, *, bos: int | None, add_bos: bool) -> Path:
    """A unigram vocabulary; ``bos`` None leaves it without a beginning of a sequence."""
    tokens = {"<pad>": CONTROL, "</s>": CONTROL, "<unk>": TokenType.UNKNOWN, "▁": NORMAL, "a": NORMAL, "▁a": NORMAL}
    file = _Tokenizer(path, "t5", tokens)
    file.writer.add_token_scores([0.0, 0.0, 0.0, -2.0, -2.5, -1.5])
    file.writer.add_unk_token_id(2)
    file.writer.add_add_space_prefix(True)
    return file.finish(bos=bos, eos=1, add_bos=add_bos, add_eos=False, chat_template=None)


class _Tokenizer:
    def __init__(self, path: Path, model: str, tokens: Mapping[str, TokenType]) -> None:
        self._path = path
        self.writer = GGUFWriter(path, "llama")
        self.writer.add_vocab_size(len(tokens))
        self.writer.add_tokenizer_model(model)
        self.writer.add_token_list(list(tokens))
        self.writer.add_token_types(list(tokens.values()))

    def finish(self, *, bos: int | None, eos: int, add_bos: bool, add_eos: bool, chat_template: str | None) -> Path:
        if bos is not None:
            self.writer.add_bos_token_id(bos)
        self.writer.add_eos_token_id(eos)
        self.writer.add_add_bos_token(add_bos)
        self.writer.add_add_eos_token(add_eos)
        if chat_template is not None:
            self.writer.add_chat_template(chat_template)
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.close()
        return self._path
