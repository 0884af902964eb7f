"""CUDA reads ``CUDA_VISIBLE_DEVICES`` once, when llama.cpp is loaded: in a real process, what comes before what."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from testkit.nvml import large, small

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
