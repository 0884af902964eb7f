"""``orchd`` as people run it, but for the driver: what it finds, what it shows, and where its pools are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from testkit.live import serving

pytestmark = [pytest.mark.device, pytest.mark.timeout(300)]


def toml(models: Path) -> str:
    return f'[models]\nroots = ["{models}"]\n[[pools]]\nmodel = "{models}/a.gguf"\nslots = 2\nctx = 256\n'


@pytest.mark.parametrize(("visible", "used"), [(None, ["gpu:0", "gpu:1"]), ("1", ["gpu:1"])])
def test_every_gpu_is_used_that_cuda_visible_devices_leaves(
    tmp_path: Path, models: Path, visible: str | None, used: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with serving(tmp_path, toml(models), module="testkit.two_gpus") as server:
        server.process.wait_healthy(server.port)
        [pool] = server.request("GET", "/health").json()["pools"]
        assert [replica["device"] for replica in pool["replicas"]] == used
        for _ in used:
            assert server.follow(server.submit(max_tokens=4, ignore_eos=True))[-1][1]["tokens_out"] == 4
        assert [f'device="{device}"' in server.metrics() for device in ("gpu:0", "gpu:1")] == [
            device in used for device in ("gpu:0", "gpu:1")
        ]


def test_check_names_the_backend_and_the_driver(tmp_path: Path, models: Path) -> None:
    (tmp_path / "orchd.toml").write_text(toml(models))
    done = subprocess.run(
        [sys.executable, "-m", "testkit.two_gpus", "check", "--json"],
        env={**os.environ, "HOME": str(tmp_path), "PYTHONPATH": os.getcwd()},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    report = json.loads(done.stdout)
    assert done.returncode == 0, report
    assert report["llama_cpp"] == "built for Vulkan"
    assert report["driver"] == "NVIDIA 580.65.06, CUDA up to 13.0"
    assert report["pools"][0]["devices"] == ["gpu:0", "gpu:1"]
