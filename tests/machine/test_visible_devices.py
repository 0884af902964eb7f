"""CUDA reads ``CUDA_VISIBLE_DEVICES`` once, when llama.cpp is loaded: in a real process, what comes before what."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pynvml
import pytest

from orchd.machine import devices
from orchd.machine.devices import Driver
from testkit.nvml import GIB, FakeNvml, large, small

PROCESS = '''
import importlib.abc, json, os, sys

events = []

class Watch(importlib.abc.MetaPathFinder):
    """Notes the first import of llama_cpp, and that nothing else of this process has come to it before."""
    def find_spec(self, name, path, target=None):
        if name == "llama_cpp":
            events.append(["llama_cpp", os.environ.get("CUDA_DEVICE_ORDER"), os.environ.get("CUDA_VISIBLE_DEVICES")])
            print(json.dumps(events), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Watch())

import pytest
from pathlib import Path
from testkit.nvml import FakeNvml
FakeNvml().install(pytest.MonkeyPatch())

class Environ(type(os.environ)):
    def __setitem__(self, key, value):
        if key.startswith("CUDA"):
            events.append([key, value])
        super().__setitem__(key, value)
os.environ.__class__ = Environ

from orchd import serve
from orchd.settings.sources import load
from orchd.settings.credentials import Credentials

serve.gpu_backend = lambda: "CUDA"
listen = serve.listen
serve.listen = lambda host, port: (events.append(["listens"]), listen(host, port))[1]
config = load(config_path=Path(sys.argv[1]), flags={}, environ={}, cwd=Path.cwd())
events.append(["serve"])
serve.serve(config, Credentials("a-token-of-a-test-0123456789", "tests"), observer=None)
'''


def events(tmp_path: Path, model: Path, pools: str, **environ: str) -> list[list[str]]:
    """What a start does until llama.cpp is loaded."""
    config = tmp_path / "orchd.toml"
    config.write_text(f"[server]\nport = 0\n{pools}".replace("MODEL", str(model)))
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path), **environ}
    done = subprocess.run(
        [sys.executable, "-c", PROCESS, str(config)], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    found: list[list[str]] = json.loads(done.stdout)
    return found


POOL = '[[pools]]\nmodel = "MODEL"\n'


def test_it_is_set_once_to_uuids_before_llama_cpp_is_loaded(tmp_path: Path, tiny_model_path: Path) -> None:
    both = f"{large().uuid},{small().uuid}"
    assert events(tmp_path, tiny_model_path, POOL) == [
        ["serve"],
        ["CUDA_DEVICE_ORDER", "PCI_BUS_ID"],
        ["CUDA_VISIBLE_DEVICES", both],
        ["llama_cpp", "PCI_BUS_ID", both],
    ]


def test_one_that_is_set_already_narrows_and_what_the_pools_use_narrows_further(
    tmp_path: Path, tiny_model_path: Path
) -> None:
    narrowed = events(tmp_path, tiny_model_path, POOL, CUDA_VISIBLE_DEVICES="1", CUDA_DEVICE_ORDER="FASTEST_FIRST")
    assert narrowed[-1] == ["llama_cpp", "PCI_BUS_ID", small().uuid]
    pools = '[[pools]]\nmodel = "MODEL"\ndevices = ["gpu:GPU-1a2b"]\n'
    further = events(tmp_path, tiny_model_path, pools, CUDA_VISIBLE_DEVICES="1,0")
    assert further[-1] == ["llama_cpp", "PCI_BUS_ID", large().uuid]


def test_a_server_without_gpu_pools_hides_them_all(tmp_path: Path, tiny_model_path: Path) -> None:
    found = events(tmp_path, tiny_model_path, '[[pools]]\nmodel = "MODEL"\ndevices = ["cpu"]\n')
    assert found[-1] == ["llama_cpp", "PCI_BUS_ID", ""]


# --- what the driver says --------------------------------------------------------------------------------------------


def test_gpus_are_found_with_what_the_driver_knows(nvml: FakeNvml) -> None:
    found = devices.find_gpus()
    assert [(gpu.index, gpu.name, gpu.uuid, gpu.memory_bytes, gpu.pci) for gpu in found] == [
        (0, "NVIDIA GeForce RTX 4090", large().uuid, 24 * GIB, "0000:01:00.0"),
        (1, "NVIDIA GeForce RTX 3060", small().uuid, 12 * GIB, "0000:41:00.0"),
    ]
    assert nvml.initialised == 0


def test_a_gpu_whose_address_nvml_does_not_tell_can_still_be_used(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetPciInfo", refuse)
    assert [(gpu.index, gpu.pci) for gpu in devices.find_gpus()] == [(0, ""), (1, "")]


def test_the_driver_says_its_version_and_its_cuda(nvml: FakeNvml) -> None:
    assert devices.find_driver() == Driver("580.65.06", "13.0")
    assert nvml.initialised == 0


def test_without_a_driver_there_is_none_and_no_gpu(nvml: FakeNvml) -> None:
    nvml.error = pynvml.NVML_ERROR_LIBRARY_NOT_FOUND
    assert devices.find_driver() is None
    assert devices.find_gpus() == []
    assert devices.free_gpu_bytes(0) is None


def test_a_card_that_does_not_answer_is_left_out_and_the_others_keep_their_numbers(
    nvml: FakeNvml, caplog: pytest.LogCaptureFixture
) -> None:
    nvml.cards[0].error = pynvml.NVML_ERROR_GPU_IS_LOST
    assert [gpu.index for gpu in devices.find_gpus()] == [1]
    assert "gpu:0 is skipped: NVML reports GPU is lost" in caplog.text


def test_free_memory_is_asked_anew_each_time(nvml: FakeNvml) -> None:
    assert devices.free_gpu_bytes(1) == 12 * GIB
    nvml.cards[1].used = 5 * GIB
    assert devices.free_gpu_bytes(1) == 7 * GIB
    nvml.cards[1].error = pynvml.NVML_ERROR_GPU_IS_LOST
    assert devices.free_gpu_bytes(1) is None
    assert devices.free_gpu_bytes(2) is None


def test_a_device_has_an_index_if_it_is_a_gpu() -> None:
    assert [devices.gpu_index(name) for name in ("gpu:0", "gpu:12", "cpu", "cpu#1")] == [0, 12, None, None]


def test_what_llama_cpp_was_compiled_for_is_read_from_what_its_installation_left(tmp_path: Path) -> None:
    assert devices.built_architectures(tmp_path) == ()
    left = tmp_path / ".orchd-wheel.txt"
    left.write_text("llama-cpp-python 0.3.36\nCMAKE_ARGS -DGGML_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=86;89 -DX=1\n")
    assert devices.built_architectures(tmp_path) == ("86", "89")
    left.write_text("CMAKE_ARGS -DCMAKE_CUDA_ARCHITECTURES=86-real;120a-real -DX=1\n")  # machine code alone
    assert devices.built_architectures(tmp_path) == ("86", "120a")
    left.write_text("llama-cpp-python 0.3.36\nCMAKE_ARGS -DLLAVA_BUILD=OFF\n")
    assert devices.built_architectures(tmp_path) == ()
