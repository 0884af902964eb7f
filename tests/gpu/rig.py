"""A real server on made-up GPUs: a model is as large as the test says, and takes that of the card it is loaded on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from engines.api import DeviceSpec, Footprint, ModelSpec, ProgressCallback, WaitCallback
from orchd import server
from orchd.machine import devices, gpus, telemetry
from orchd.server import Server
from orchd.settings.config import Config
from orchd.settings.credentials import Credentials
from testkit.brake import DEADLINE_S, Brake
from testkit.fake_engine import FakeEngine, FakeModel
from testkit.harness import TOKEN, Running
from testkit.nvml import Card, FakeNvml
from testkit.observers import WhenReady

CONTEXT_BYTES = 300 * 2**20
"""What CUDA takes for the process on each card."""


class GpuModel(FakeModel):
    """Holds memory of a card until it is closed."""

    def __init__(self, slots: int, card: Card, size: int, *, gated: bool) -> None:
        super().__init__(slots, gated=gated)
        self._card = card
        self._size = size
        card.used += size

    @property
    def device_bytes(self) -> int:
        return self._size

    def close(self) -> None:
        if not self.closes:
            self._card.used -= self._size
        super().close()


@dataclass
class GpuEngine(FakeEngine):
    """Loads models of a given size on made-up cards.

    Attributes:
        cards: In the order of CUDA's ordinals.
        sizes: What each file needs, by its stem.
    """

    cards: list[Card] = field(default_factory=list)
    sizes: dict[str, Footprint] = field(default_factory=dict)

    def vet(self, spec: ModelSpec, *, on_wait: WaitCallback | None = None) -> Footprint:
        return self.sizes[spec.path.stem]

    def load(self, spec: ModelSpec, device: DeviceSpec, *, on_progress: ProgressCallback | None = None) -> FakeModel:
        super().load(spec, device, on_progress=on_progress)
        self.models.pop()
        card = self.cards[device.ordinal]
        if not card.used:
            card.used = CONTEXT_BYTES
        size = self.sizes[spec.path.stem].total
        assert card.used + size <= card.total, "the fit was not checked"
        model = GpuModel(spec.slots, card, size, gated=self.gated)
        self.models.append(model)
        return model


@dataclass
class OnGpus(Running):
    """The same with the engine."""

    engine: GpuEngine = field(default_factory=GpuEngine)

    async def replicas(self) -> list[dict[str, Any]]:
        """The first pool's replicas in ``/health``."""
        found: list[dict[str, Any]] = (await self.request("GET", "/health")).json()["pools"][0]["replicas"]
        return found

    async def of_gpus(self, name: str) -> dict[str, float]:
        """A metric's samples by device."""
        return {dict(labels)["device"]: v for (sample, labels), v in (await self.metrics()).items() if sample == name}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks at the driver a hundred times a second."""
    monkeypatch.setattr(telemetry, "PERIOD_S", 0.01)
    monkeypatch.setattr(server, "PERIOD_S", 0.01)


@contextlib.asynccontextmanager
async def serving(
    nvml: FakeNvml, sizes: dict[str, Footprint], model: Path, *, gated: bool = False, **pool: Any
) -> AsyncIterator[OnGpus]:
    """Serve one pool until the context ends."""
    table = {"model": str(model), "slots": 2, "ctx": 512, **pool}
    config = msgspec.convert({"models": {"roots": [str(model.parent)]}, "pools": [table]}, Config)
    found = gpus.find_gpus()
    placed, used = devices.assign(config.pools, found, gpu_build=True, cores=os.cpu_count() or 1)
    engine = GpuEngine(gated=gated, cards=[nvml.cards[gpu.index] for gpu in used], sizes=sizes)
    listening = socket.create_server(("127.0.0.1", 0))
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=DEADLINE_S)) as session:
        running = OnGpus(f"http://127.0.0.1:{listening.getsockname()[1]}", Brake(), session, engine=engine)
        composed = Server(config, Credentials(TOKEN, "tests"), engine, placed, WhenReady(running.summary.set_result))
        stop = asyncio.Event()
        serve = asyncio.create_task(composed.run([model], listening, stop=stop))
        try:
            await asyncio.wait({serve, running.summary}, return_when=asyncio.FIRST_COMPLETED)  # type: ignore[type-var]  # a task and a future
            if serve.done():
                serve.result()
            yield running
        finally:
            for made in engine.models:
                made.allow(1000)
            stop.set()
            await serve
