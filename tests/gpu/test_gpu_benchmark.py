"""What of the GPU benchmark can be shown without a GPU: its arithmetic, its options, what it says if it cannot run."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pynvml
import pytest

from benchmarks.compare import setup
from benchmarks.compare.drivers import Setup
from benchmarks.gpu import __main__ as bench
from benchmarks.gpu.card import Card, bandwidth, look_at
from testkit.nvml import FakeNvml

ROOT = Path(__file__).parents[2]


def test_bandwidth_is_what_the_makers_say() -> None:
    assert bandwidth(10501, 384) / 1e9 == pytest.approx(1008, rel=0.001)  # RTX 4090
    assert bandwidth(2619, 5120) / 1e9 == pytest.approx(3352, rel=0.001)  # H100 SXM


def test_a_card_that_does_not_tell_has_no_bandwidth(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_supported(*_: object) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetMaxClockInfo", not_supported)
    assert look_at("gpu:1") == Card("NVIDIA GeForce RTX 3060", 0.0)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMaxClockInfo", lambda *_: 7501)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryBusWidth", lambda _: 192)
    assert look_at("gpu:1").bandwidth == pytest.approx(360e9, rel=0.001)
    with pytest.raises(setup.SetupError, match="gpu:7 cannot be used: NVML says"):
        look_at("gpu:7")


def test_goals_are_held_against_medians() -> None:
    row = bench.Row("m", 4 * 10**9, bench=[100, 90, 110])
    row.ours, row.theirs = {1: [96, 98, 97], 32: [1300, 1100]}, {1: [95, 95, 95], 32: [1000, 1000]}
    row.outside = 0.051
    said = dict(row.verdicts(Card("card", 1e12)))
    assert list(said.values()) == [True, None, None, True, False]
    assert "1 stream:     97.0 tokens/s, llama-bench    100.0: 0.970" in said
    assert "1 stream: 38.8% of the memory's bandwidth (1000 GB/s)" in said
    assert "32 slots: 5.1% of a round outside llama_decode" in said


def test_the_weights_of_a_token_are_all_but_the_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"token_embd.weight": 1000, "blk.0.ffn_up.weight": 20, "output_norm.weight": 3}

    def read(_: Path) -> SimpleNamespace:
        return SimpleNamespace(tensors=[SimpleNamespace(name=name, n_bytes=size) for name, size in sizes.items()])

    monkeypatch.setattr("gguf.GGUFReader", read)
    assert bench.weights_bytes(Path("tied.gguf")) == 1023  # the table is the output matrix as well
    sizes["output.weight"] = 700
    assert bench.weights_bytes(Path("untied.gguf")) == 723


def test_models_go_wholly_to_one_gpu_on_both_sides(tmp_path: Path) -> None:
    assert bench.offload("gpu:1") == ["-ngl", "999", "-sm", "none", "-mg", "1"]
    assert bench.offload("cpu") == ["-ngl", "0"]
    held = Setup(Path("m.gguf"), slots=32, ctx=1024, threads=4)
    bench.OrchdOn("gpu:1").command(held, tmp_path, 0)
    config = (tmp_path / "orchd.toml").read_text()
    assert 'devices = ["gpu:1"]' in config.partition("[[pools]]")[2]


def test_without_a_build_for_gpus_it_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "gpu_backend", lambda: None)
    assert bench.main([]) == 2
    assert "make BACKEND=cuda setup, or try --device cpu" in capsys.readouterr().err


def test_the_one_command_is_a_script_that_bash_can_read() -> None:
    script = ROOT / "benchmarks" / "gpu.sh"
    assert script.stat().st_mode & 0o111
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
