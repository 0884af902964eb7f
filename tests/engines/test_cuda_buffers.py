"""What attention takes on an NVIDIA GPU: arithmetic, and what vetting makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines.api import DeviceSpec, Footprint, ModelSpec
from engines.llamacpp.cuda_buffers import Cache, caches, half_copies, has_flash_attention
from engines.llamacpp.model import LlamaModel
from engines.llamacpp.native.context import NativeContext
from engines.llamacpp.vet import vet
from orchd.machine.memory import taken
from testkit.tiny_gguf import LAYERS, write_tiny_llama

MIB = 1 << 20


def test_a_cache_is_read_from_llama_cpps_log() -> None:
    line = (
        "llama_kv_cache: size =  136.00 MiB (  4096 cells,  32 layers,  8/8 seqs), K (q8_0):   68.00 MiB, "
        "V (f16):   68.00 MiB"
    )
    assert caches(["another", line]) == [Cache(136 * MIB, 32, "q8_0", 68 * MIB, "f16", 68 * MIB)]


def test_one_layer_of_a_quantised_cache_is_copied_as_halves() -> None:
    eighth = Cache(64 * 34 * MIB, 32, "q8_0", 32 * 34 * MIB, "q8_0", 32 * 34 * MIB)
    assert half_copies(eighth) == 2 * (64 * MIB + 128)


def test_a_cache_of_halves_is_not_copied() -> None:
    assert half_copies(Cache(2 * MIB, 32, "f16", MIB, "f16", MIB)) == 0


def test_a_latent_cache_has_no_v_to_copy() -> None:
    assert half_copies(Cache(MIB, 1, "bf16", MIB, "bf16", 0)) == MIB + 128


@pytest.mark.parametrize(
    ("shape", "compiled"),
    [
        ((128, 128, 32, 8), True),
        ((64, 64, 9, 3), True),
        ((192, 128, 64, 8), True),
        ((192, 128, 16, 4), False),
        ((576, 512, 128, 1), True),
        ((576, 512, 1, 1), False),
        ((32, 32, 4, 4), False),
        ((128, 64, 8, 8), False),
    ],
)
def test_flash_attention_is_compiled_for_some_heads(shape: tuple[int, int, int, int], compiled: bool) -> None:
    assert has_flash_attention(*shape) is compiled


def test_vetting_counts_the_copies_of_a_cache_that_is_not_of_halves(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "tiny.gguf")
    halves, floats = (
        vet(ModelSpec(path, slots=2, ctx=512, cache_type_k=kind, cache_type_v=kind, flash_attn="on"))
        for kind in ("f16", "f32")
    )
    assert halves.on_gpu == 0
    assert floats.on_gpu == floats.cache // 2 // LAYERS + 2 * 128


def test_vetting_counts_what_heads_without_flash_attention_take(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "tiny.gguf")  # heads of 16
    auto, off = (vet(ModelSpec(path, slots=2, ctx=512, flash_attn=setting)) for setting in ("auto", "off"))
    assert auto.buffers + auto.on_gpu == off.buffers > auto.buffers
    assert off.on_gpu == 0


def test_only_a_gpu_is_asked_for_it() -> None:
    footprint = Footprint(weights=1000, cache=200, buffers=30, on_gpu=4)
    assert taken(footprint) == 1230
    assert taken(footprint, memory="gpu:0") == 1234


def test_a_gpu_is_warmed_up_with_all_slots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[int, int]] = []
    right = NativeContext.decode

    def decode(context: NativeContext, n_rows: int) -> None:
        steps.append((n_rows, int(context.output[:n_rows].sum())))
        right(context, n_rows)

    monkeypatch.setattr(NativeContext, "decode", decode)
    spec = ModelSpec(write_tiny_llama(tmp_path / "tiny.gguf"), slots=3, ctx=256, batch=64)
    LlamaModel(spec, DeviceSpec("gpu")).close()
    assert steps[0] == (63, 1), "the largest first"
    assert {(63, 3), (3, 3), (1, 1)} < set(steps)
