"""Damaged GGUF files, made from the bytes of a good one: every damage the same each time.

llama.cpp refuses most of them, aborts on some and loads some of those with flipped bits: give them to a
process that may die.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from gguf import GGUFReader

Damaged = tuple[str, bytes]
"""What was done to the file, fit for a test id and a file name, and the file."""

_STRING, _ARRAY = 8, 9
_FIXED_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_TENSOR_COUNT, _KV_COUNT, _FIRST_KV = 8, 16, 24


def corpus(good: bytes, *, seed: int = 0, truncations: int = 40, flips: int = 200) -> Iterator[Damaged]:
    """Every kind of damage below, in one go."""
    yield from not_gguf()
    yield from truncated(good, count=truncations, seed=seed)
    yield from flipped_bits(good, count=flips, seed=seed)
    yield from absurd_numbers(good)
    yield "duplicate-tokens", duplicate_tokens(good)
    yield from tensors_out_of_bounds(good)
    yield "wrong-architecture", wrong_architecture(good)


def without_embedding(path: Path, token: int) -> Path:
    """Make one row of a model's embeddings NaN, in place: it computes NaN after that token, and numbers until then."""
    reader = GGUFReader(path, "r+")
    embeddings = next(tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
    embeddings.data[token] = np.nan
    reader.data.flush()
    return path


def not_gguf() -> Iterator[Damaged]:
    yield "empty", b""
    yield "text", b"This is not a model.\n" * 100
    yield "magic-only", b"GGUF"


def truncated(good: bytes, *, count: int = 40, seed: int = 0) -> Iterator[Damaged]:
    """Cut at `count` places, by turns in the header and in the tensor data."""
    chance = random.Random(seed)
    header = _Layout.of(good).header_bytes
    for number in range(count):
        end = chance.randrange(5, header) if number % 2 == 0 else chance.randrange(header, len(good))
        yield f"truncated-{number}-at-{end}", good[:end]


def flipped_bits(good: bytes, *, count: int = 200, seed: int = 0) -> Iterator[Damaged]:
    """One to eight bits of the header turned round."""
    chance = random.Random(seed)
    header = _Layout.of(good).header_bytes
    for number in range(count):
        data = bytearray(good)
        for _ in range(chance.randint(1, 8)):
            data[chance.randrange(header)] ^= 1 << chance.randrange(8)
        yield f"flipped-{number}", bytes(data)


def absurd_numbers(good: bytes) -> Iterator[Damaged]:
    """Counts, lengths and hyperparameters that no file can hold."""
    layout = _Layout.of(good)
    tokens = layout.values["tokenizer.ggml.tokens"]
    tensor = next(iter(layout.tensors.values()))
    for name, offset in (
        ("tensor-count", _TENSOR_COUNT),
        ("kv-count", _KV_COUNT),
        ("key-length", _FIRST_KV),
        ("token-count", tokens + 4),
        ("token-length", tokens + 12),
        ("tensor-rows", tensor + 4),
    ):
        for power in (32, 62):
            yield f"{name}-2^{power}", _with_u64(good, offset, 1 << power)
        yield f"{name}-max", _with_u64(good, offset, (1 << 64) - 1)
    yield "tensor-dimensions-2^31", _with_u32(good, tensor, 1 << 31)
    for suffix in ("block_count", "embedding_length", "attention.head_count"):
        offset = next(offset for key, offset in layout.values.items() if key.endswith(f".{suffix}"))
        for value in (0, (1 << 32) - 1):
            yield f"{suffix}-{value}", _with_u32(good, offset, value)


def duplicate_tokens(good: bytes) -> bytes:
    """Two equal entries in the vocabulary: llama.cpp aborts the process."""
    tokens = _Layout.of(good).tokens
    second_at, second = tokens[-1]
    first = next(text for _, text in reversed(tokens[:-1]) if len(text) == len(second))
    return good[:second_at] + first + good[second_at + len(second) :]


def tensors_out_of_bounds(good: bytes) -> Iterator[Damaged]:
    """The last tensor's data begins past the end, by little and by much, and between two aligned places."""
    layout = _Layout.of(good)
    name, info = list(layout.tensors.items())[-1]
    (dimensions,) = struct.unpack_from("<I", good, info)
    offset = info + 4 + 8 * dimensions + 4
    (right,) = struct.unpack_from("<Q", good, offset)
    wrong = {"end": right + 32, "far": 1 << 40, "wrap": (1 << 64) - 32, "unaligned": right - 1}
    for label, value in wrong.items():
        yield f"tensor-offset-{label}-{name}", _with_u64(good, offset, value)


def wrong_architecture(good: bytes) -> bytes:
    """``general.architecture`` is a name of the same length that no engine knows."""
    at = _Layout.of(good).values["general.architecture"]
    name, after = _string(good, at)
    return good[: at + 8] + b"x" * len(name) + good[after:]


def _with_u64(good: bytes, offset: int, value: int) -> bytes:
    return good[:offset] + struct.pack("<Q", value) + good[offset + 8 :]


def _with_u32(good: bytes, offset: int, value: int) -> bytes:
    return good[:offset] + struct.pack("<I", value) + good[offset + 4 :]


@dataclass
class _Layout:
    """Where things stand in a good file, as offsets from its beginning.

    Attributes:
        values: Each key's value, after its type; of an array, its element type, then its length and elements.
        tensors: Each tensor's number of dimensions, which its dimensions, type and offset follow.
        tokens: Each vocabulary entry's text, after its length, and the text itself.
        header_bytes: Everything before the padding and the tensor data.
    """

    values: dict[str, int] = field(default_factory=dict)
    tensors: dict[str, int] = field(default_factory=dict)
    tokens: list[tuple[int, bytes]] = field(default_factory=list)
    header_bytes: int = 0

    @classmethod
    def of(cls, good: bytes) -> _Layout:
        layout = cls()
        tensor_count, kv_count = struct.unpack_from("<QQ", good, _TENSOR_COUNT)
        at = _FIRST_KV
        for _ in range(kv_count):
            key, at = _string(good, at)
            (kind,) = struct.unpack_from("<I", good, at)
            layout.values[key.decode()] = at + 4
            at = _after_value(good, at + 4, kind)
        for _ in range(tensor_count):
            name, at = _string(good, at)
            layout.tensors[name.decode()] = at
            (dimensions,) = struct.unpack_from("<I", good, at)
            at += 4 + 8 * dimensions + 4 + 8
        layout.header_bytes = at
        tokens = layout.values["tokenizer.ggml.tokens"]
        (count,) = struct.unpack_from("<Q", good, tokens + 4)
        at = tokens + 12
        for _ in range(count):
            text, after = _string(good, at)
            layout.tokens.append((at + 8, text))
            at = after
        return layout


def _string(good: bytes, at: int) -> tuple[bytes, int]:
    (length,) = struct.unpack_from("<Q", good, at)
    return good[at + 8 : at + 8 + length], at + 8 + length


def _after_value(good: bytes, at: int, kind: int) -> int:
    if kind == _STRING:
        return _string(good, at)[1]
    if kind != _ARRAY:
        return at + _FIXED_SIZES[kind]
    element, count = struct.unpack_from("<IQ", good, at)
    at += 12
    if element in _FIXED_SIZES:
        return at + int(count) * _FIXED_SIZES[element]
    for _ in range(count):
        at = _after_value(good, at, element)
    return at
