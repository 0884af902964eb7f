"""Writes a GGUF of a real model's size and shape with random weights, in seconds and without a network.

    python -m testkit.synthetic_gguf --shape 8B --type Q4_K /tmp/synthetic-8b.gguf

Speed, memory fit and reload depend on a model's shape, not on what it knows. The vocabulary and the chat template are
the demo model's, so prompts and streams are real text as far as the server can tell; what comes out is noise. Where the
demo model is not installed, ``ORCHD_TEST_VOCABULARY`` names a file that has its vocabulary alone (`write_vocabulary`).

A quantised tensor is one quantised tile of random rows over and over (llama.cpp's own quantiser makes it), because
quantising billions of numbers takes minutes and changes nothing that is measured here. The matrices of the vocabulary
are made of the tile's blocks in random order: of equal rows, 768 tokens would always be equally likely, which no model
shows and which costs a sampler a multiple.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import importlib.metadata
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from orchd.models.references import demo_model_path

TILE_ROWS = 64
"""Rows quantised once and repeated."""
OUTPUT_SCALE = 8.0
"""Standard deviation of logits: few tokens stand out then, as with real models."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama.

    Attributes:
        layers: Transformer blocks.
        width: Length of an embedding.
        heads: Attention heads.
        kv_heads: Heads of keys and values.
        ff: Width of the feed-forward layer.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    ff: int


SHAPES = {
    "135M": Shape(30, 576, 9, 3, 1536),
    "1B": Shape(16, 2048, 32, 8, 8192),
    "3B": Shape(28, 3072, 24, 8, 8192),
    "8B": Shape(32, 4096, 32, 8, 14336),
}
"""Those of the demo model (SmolLM2 135M; its rows are too short for Q4_K), and of Llama 3.2 1B and 3B and Llama 3.1 8B
but for the vocabulary."""


def vocabulary_donor() -> Path:
    """The file whose vocabulary models get. Exits if there is none."""
    donor = os.environ.get("ORCHD_TEST_VOCABULARY") or demo_model_path()
    if donor is None:
        raise SystemExit("the demo model is not installed, and its vocabulary is needed; run 'make setup'")
    return Path(donor)


def write_vocabulary(path: Path) -> Path:
    """Write the donor's vocabulary and chat template, which is all that `write` needs of it: 1.5 % of its size."""
    writer = gguf.GGUFWriter(path, "llama")
    _copy_tokenizer(vocabulary_donor(), writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def write(path: Path, shape: Shape, kind: gguf.GGMLQuantizationType, *, ctx: int = 131072, seed: int = 0) -> Path:
    """Write the file; its size is that of a real model of this shape and type, less the difference in vocabulary.

    Args:
        path: Where.
        shape: Sizes.
        kind: Type of the matrices; vectors stay F32. Types that need an importance matrix (IQ1, IQ2) are refused.
        ctx: Context length that the metadata claims.
        seed: Of the random weights.
    """
    writer = gguf.GGUFWriter(path, "llama")
    vocabulary = _copy_tokenizer(vocabulary_donor(), writer)
    writer.add_name(f"synthetic {path.stem}")
    writer.add_context_length(ctx)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ff)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.width // shape.heads)
    writer.add_rope_freq_base(500_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocabulary)
    tiles = _Tiles(kind, seed)
    tensors = list(_tensors(shape, vocabulary))
    for name, rows, columns in tensors:
        if rows == 1:
            writer.add_tensor_info(name, (columns,), np.dtype(np.float32), columns * 4)
        else:
            row_bytes = tiles.row_bytes(columns)
            writer.add_tensor_info(name, (rows, row_bytes), np.dtype(np.uint8), rows * row_bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, rows, columns in tensors:
        if rows == 1:
            writer.write_tensor_data(np.ones(columns, np.float32))
        elif rows == vocabulary:
            writer.write_tensor_data(tiles.unlike(rows, columns, OUTPUT_SCALE if name == "output.weight" else 1.0))
        else:
            writer.write_tensor_data(tiles.tensor(rows, columns))
    writer.close()
    return path


def _tensors(shape: Shape, vocabulary: int) -> Iterator[tuple[str, int, int]]:
    """Name, rows and columns of every tensor; vectors have one row."""
    kv = shape.width // shape.heads * shape.kv_heads
    yield "token_embd.weight", vocabulary, shape.width
    yield "output_norm.weight", 1, shape.width
    yield "output.weight", vocabulary, shape.width
    for layer in range(shape.layers):
        block = f"blk.{layer}"
        yield f"{block}.attn_norm.weight", 1, shape.width
        yield f"{block}.attn_q.weight", shape.width, shape.width
        yield f"{block}.attn_k.weight", kv, shape.width
        yield f"{block}.attn_v.weight", kv, shape.width
        yield f"{block}.attn_output.weight", shape.width, shape.width
        yield f"{block}.ffn_norm.weight", 1, shape.width
        yield f"{block}.ffn_gate.weight", shape.ff, shape.width
        yield f"{block}.ffn_up.weight", shape.ff, shape.width
        yield f"{block}.ffn_down.weight", shape.width, shape.ff


def _copy_tokenizer(donor: Path, writer: gguf.GGUFWriter) -> int:
    """Copy every ``tokenizer.*`` key; returns the number of tokens."""
    for key, value, kind, of_items in _tokenizer(donor):
        writer.add_key_value(key, value, kind, of_items)
        if key == "tokenizer.ggml.tokens":
            tokens = len(value)
    return tokens


@functools.cache
def _tokenizer(donor: Path) -> list[tuple[str, Any, gguf.GGUFValueType, gguf.GGUFValueType | None]]:
    """Key, value, type and type of the items of a list; reading them takes seconds."""
    fields = [(key, field) for key, field in gguf.GGUFReader(donor).fields.items() if key.startswith("tokenizer.")]
    return [
        (key, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
        for key, field in fields
    ]


class _Tiles:
    """Quantised random rows, made once for each width."""

    def __init__(self, kind: gguf.GGMLQuantizationType, seed: int) -> None:
        self._kind = kind
        self._random = np.random.default_rng(seed)
        self._made: dict[int, npt.NDArray[np.uint8]] = {}
        package = importlib.metadata.distribution("llama-cpp-python")
        self._ggml = ctypes.CDLL(str(package.locate_file("llama_cpp/lib/libggml-base.so")))
        self._ggml.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
        self._ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
        if self._ggml.ggml_quantize_requires_imatrix(int(kind)):
            raise SystemExit(f"{kind.name} needs an importance matrix; choose another type")

    def row_bytes(self, columns: int) -> int:
        block, size = gguf.GGML_QUANT_SIZES[self._kind]
        return columns // block * size

    def tensor(self, rows: int, columns: int) -> npt.NDArray[np.uint8]:
        """So many rows, repeating the tile."""
        if columns not in self._made:
            self._made[columns] = self._tile(columns)
        tile = self._made[columns]
        return np.concatenate([tile] * (rows // TILE_ROWS) + [tile[: rows % TILE_ROWS]])

    def unlike(self, rows: int, columns: int, scale: float) -> npt.NDArray[np.uint8]:
        """So many rows, no two of them equal."""
        blocks = columns // gguf.GGML_QUANT_SIZES[self._kind][0]
        tile = self._tile(columns, scale).reshape(TILE_ROWS * blocks, -1)
        return tile[self._random.integers(0, len(tile), (rows, blocks))].reshape(rows, -1)

    def _tile(self, columns: int, scale: float = 1.0) -> npt.NDArray[np.uint8]:
        values = self._random.standard_normal((TILE_ROWS, columns), np.float32) * np.float32(scale / columns**0.5)
        tile = np.empty((TILE_ROWS, self.row_bytes(columns)), np.uint8)
        self._ggml.ggml_quantize_chunk(
            ctypes.c_int(int(self._kind)),
            values.ctypes.data_as(ctypes.c_void_p),
            tile.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_int64(0),
            ctypes.c_int64(TILE_ROWS),
            ctypes.c_int64(columns),
            None,
        )
        return tile


def main() -> None:
    """Write one file and say how large it is."""
    parser = argparse.ArgumentParser(description="Write a GGUF of a real model's size with random weights.")
    parser.add_argument("path", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="1B")
    parser.add_argument("--type", choices=[kind.name for kind in gguf.GGMLQuantizationType], default="Q4_K")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write(options.path, SHAPES[options.shape], gguf.GGMLQuantizationType[options.type], seed=options.seed)
    print(f"{options.path}: {options.path.stat().st_size / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
