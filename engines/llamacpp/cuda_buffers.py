"""Pure: what attention takes on an NVIDIA GPU besides what llama.cpp reports when it adds up memory on a CPU.

From the pinned llama.cpp's ``ggml-cuda/fattn.cu`` and ``fattn-common.cuh``. None of it has been compared with a card.

- Prompts go through kernels that read halves (``ggml_cuda_get_best_fattn_kernel``: TILE and MMA_F16). Whatever else a
  cache holds is copied for them, all cells of one layer, K and V (``ggml_cuda_flash_attn_ext_get_f16_extra_data``). The
  copies are a part of the compute buffer there, and layers take turns in it.
- Flash attention is compiled for some head sizes only. With others and ``flash_attn = "auto"``, llama.cpp goes without
  it there, and what that takes it reports on a CPU too, if it is told to do without.

For example, 8 slots of 4,096 tokens with 8 KV heads of 128 and ``q8_0``: 32,768 cells x 1,024 x 2 bytes are 64 MiB for
K, and as much for V.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final, NamedTuple

BITS: Final = {"f32": 32.0, "f16": 16.0, "bf16": 16.0, "q4_0": 4.5, "q8_0": 8.5}
"""Of a number in a cache, its share of the block's scale included."""
PADDING: Final = 128
"""Bytes to a multiple of which the copies begin."""

_LINE: Final = re.compile(
    r"llama_kv_cache\S*: size =\s*([\d.]+) MiB.*cells,\s*(\d+) layers,.*"
    r"K \((\w+)\):\s*([\d.]+) MiB, V \((\w+)\):\s*([\d.]+) MiB"
)


class Cache(NamedTuple):
    """A KV cache as llama.cpp reports it: bytes of all its layers and slots, to a hundredth of a MiB."""

    n_bytes: float
    layers: int
    type_k: str
    k_bytes: float
    type_v: str
    v_bytes: float


def caches(lines: Sequence[str]) -> list[Cache]:
    """Those in llama.cpp's log."""
    found = (_LINE.search(line) for line in lines)
    return [
        Cache(float(m[1]) * 2**20, int(m[2]), m[3], float(m[4]) * 2**20, m[5], float(m[6]) * 2**20) for m in found if m
    ]


def half_copies(cache: Cache) -> int:
    """Bytes of the copies as halves that attention makes of one layer."""
    total = 0.0
    for kind, size in ((cache.type_k, cache.k_bytes), (cache.type_v, cache.v_bytes)):
        if kind != "f16" and size:
            total += size / cache.layers * 16 / BITS[kind] + PADDING
    return int(total)


def has_flash_attention(head_k: int, head_v: int, heads: int, kv_heads: int) -> bool:
    """Whether a kernel is compiled for heads of these sizes, of which so many share a KV head."""
    shared = heads // kv_heads
    if head_k in (40, 64, 72, 80, 96, 112, 128, 256):
        return head_v == head_k
    return shared >= 2 and {
        192: head_v == 128 and shared % 8 == 0,
        320: head_v == 256 and shared % 32 == 0,
        512: head_v == 512,
        576: head_v == 512,
    }.get(head_k, False)
