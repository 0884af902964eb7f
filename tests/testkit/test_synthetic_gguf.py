"""Models of a real size that nobody trained: whether llama.cpp takes them, and whether they are what they claim."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest

from engines.api import DeviceSpec, ModelSpec, SamplingParams, Sequence
from engines.llamacpp.engine import LlamaCppEngine
from testkit.synthetic_gguf import SHAPES, TILE_ROWS, Shape, _Tiles, write

Kind = gguf.GGMLQuantizationType


def test_llama_cpp_loads_it_and_it_streams(synthetic_path: Path) -> None:
    engine = LlamaCppEngine()
    vocab = engine.load_vocab(synthetic_path)
    model = engine.load(ModelSpec(synthetic_path, slots=1, ctx=256, batch=64), DeviceSpec("cpu", threads=1))
    prompt = vocab.tokenize_chat([{"role": "user", "content": "Hello"}]).tokens  # the demo model's own template
    model.admit(Sequence("a", prompt, 8, sampling=SamplingParams(temperature=0, ignore_eos=True)))
    events = []
    while model.busy:
        events += model.step()
    model.close()
    vocab.close()
    assert events[-1].tokens_out == 8


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.Q8_0, Kind.F16, Kind.BF16])
def test_rows_are_as_long_as_the_type_says_and_as_many_as_asked(kind: gguf.GGMLQuantizationType) -> None:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    assert TILE_ROWS * 2 < 150 < TILE_ROWS * 3
    assert _Tiles(kind, 0).tensor(150, 512).shape == (150, 512 // block * size)


def test_the_same_seed_gives_the_same_weights_and_another_one_does_not() -> None:
    one, two, three = (_Tiles(Kind.Q8_0, seed).tensor(64, 256).tobytes() for seed in (0, 0, 1))
    assert one == two != three


def test_no_two_tokens_have_the_same_weights() -> None:
    rows = _Tiles(Kind.Q4_0, 0).unlike(5000, 576, 1.0)
    assert rows.shape == _Tiles(Kind.Q4_0, 0).tensor(5000, 576).shape
    assert len({row.tobytes() for row in rows}) == 5000


def test_the_shapes_are_those_of_real_models() -> None:
    def parameters(shape: Shape) -> int:
        kv = shape.width // shape.heads * shape.kv_heads
        block = 2 * shape.width**2 + 2 * kv * shape.width + 3 * shape.width * shape.ff
        return shape.layers * block

    assert {name: round(parameters(shape) / 1e9, 1) for name, shape in SHAPES.items()} == {
        "135M": 0.1,
        "1B": 1.0,
        "3B": 2.8,
        "8B": 7.0,
    }


def test_a_type_that_needs_an_importance_matrix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="IQ1_S needs an importance matrix"):
        write(tmp_path / "none.gguf", SHAPES["1B"], Kind.IQ1_S)
