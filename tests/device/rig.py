"""A real server on two devices, and what llama.cpp says to have allocated there."""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from engines.api import DeviceSpec
from orchd.machine.devices import Device
from testkit import harness
from testkit.harness import Running

SLOTS, CTX = 4, 512


def on_gpu(_pool: int, replica: int) -> Device:
    return Device(f"gpu:{replica}", DeviceSpec("gpu", replica))


@contextlib.asynccontextmanager
async def serving(models: Path, *, cancel_grace_s: float = 20, **pool: Any) -> AsyncIterator[Running]:
    """One pool on both devices, unless it names others, with the model ``a``."""
    table = {"devices": ["gpu:0", "gpu:1"], "slots": SLOTS, "ctx": CTX, **pool}
    roots, tasks = {"roots": [str(models)]}, {"cancel_grace_s": cancel_grace_s}
    async with harness.serving(models / "a.gguf", device_of=on_gpu, pool=table, models=roots, tasks=tasks) as running:
        yield running


async def reload(server: Running, name: str) -> tuple[int, dict[str, Any]]:
    answer = await server.request("POST", "/v1/pools/default/reload", new_model_ref=name)
    return answer.status, answer.json()


async def replicas(server: Running) -> list[dict[str, Any]]:
    """The pool's replicas in ``/health``."""
    found: list[dict[str, Any]] = (await server.request("GET", "/health")).json()["pools"][0]["replicas"]
    return found


async def of_gpus(server: Running, name: str) -> dict[str, float]:
    """A metric's samples by device."""
    return {dict(labels)["device"]: v for (sample, labels), v in (await server.metrics()).items() if sample == name}


_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def allocated(log: str) -> dict[str, int]:
    """Bytes in each device's buffers at the end of a log that llama.cpp wrote with ``GGML_VK_MEMORY_LOGGER``."""
    totals = re.findall(r"(Vulkan\d): [+-].*Total device: ([\d.]+) (\w+),", log)
    return {device: int(float(size) * _UNITS[unit]) for device, size, unit in totals}
