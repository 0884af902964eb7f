"""Home profile, section 6: the two series of GPUs. The driver is made up, the model computes on the CPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pynvml
import pytest

from engines.api import DeviceSpec, ModelSpec, ProgressCallback
from engines.llamacpp.model import LlamaModel
from orchd.machine.devices import Device
from testkit import harness
from testkit.brake import BrakedEngine
from tools import metrics_lint

UTILIZATION = {0: 37, 1: 100}
MODEL_BYTES = 5 * 2**30


class _OnCpu(BrakedEngine):
    def load(self, spec: ModelSpec, device: DeviceSpec, *, on_progress: ProgressCallback | None = None) -> LlamaModel:
        return super().load(spec, DeviceSpec("cpu", threads=1), on_progress=on_progress)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver with two GPUs, and a harness whose replicas are on them."""
    made_up = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetHandleByUUID": lambda uuid: int(str(uuid)[-1]),
        "nvmlDeviceGetUUID": lambda handle: f"GPU-0000000{handle}",
        "nvmlDeviceGetName": lambda handle: "Made-Up 3000",
        "nvmlDeviceGetMemoryInfo": lambda handle, *_: SimpleNamespace(
            total=24 * 2**30, used=6 * 2**30, free=18 * 2**30
        ),
        "nvmlDeviceGetUtilizationRates": lambda handle: SimpleNamespace(gpu=UTILIZATION[handle], memory=1),
    }
    for name, call in made_up.items():
        monkeypatch.setattr(pynvml, name, call)

    def on_gpu(name: str, spec: DeviceSpec) -> Device:
        index = int(name.rpartition(".")[2])
        return Device(f"gpu:{index}", DeviceSpec("gpu", index, threads=1))

    monkeypatch.setattr(LlamaModel, "device_bytes", property(lambda model: MODEL_BYTES))
    monkeypatch.setattr(harness, "Device", on_gpu)
    monkeypatch.setattr(harness, "BrakedEngine", _OnCpu)


async def scrape(model: Path) -> str:
    async with harness.serving(model, pool={"devices": ["cpu", "cpu"]}) as server:
        await server.run(max_tokens=4)
        return (await server.request("GET", "/metrics")).body.decode()


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("name", "values"),
    [
        pytest.param("gpu_utilization", [0.37, 1.0], marks=pytest.mark.home("HOME-6.6")),
        pytest.param("vram_used_bytes", [MODEL_BYTES] * 2, marks=pytest.mark.home("HOME-6.7")),
    ],
)
async def test_a_gpu_series_is_there_with_exactly_its_labels(
    tiny_model_path: Path, name: str, values: list[float]
) -> None:
    text = await scrape(tiny_model_path)
    samples = [s for family in metrics_lint.families(text) for s in family.samples if s.name == name]
    assert [sample.value for sample in samples] == values
    assert [sample.labels["device"] for sample in samples] == ["gpu:0", "gpu:1"]
    assert [sample.labels["replica_id"] for sample in samples] == ["0", "1"]
    assert {frozenset(sample.labels) for sample in samples} == {
        frozenset({"engine", "engine_version", "pool_id", "replica_id", "device"})
    }


@pytest.mark.home("HOME-6.8")
@pytest.mark.usefixtures("two_gpus")
async def test_with_gpus_there_is_nothing_else_either(tiny_model_path: Path) -> None:
    assert metrics_lint.lint(await scrape(tiny_model_path), metrics_lint.load(), gpu=True) == []
