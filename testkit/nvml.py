"""A driver with made-up GPUs, in the place of ``pynvml``'s functions."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace

import pynvml
import pytest

GIB = 2**30


@dataclass
class Card:
    """A GPU.

    Attributes:
        bus: Its PCI bus.
        used: Bytes taken, whoever has them.
        busy: What NVML calls utilisation, in percent; None for a card that does not tell.
        error: NVML's code for whatever is asked of it; None while it answers.
    """

    name: str
    uuid: str
    total: int
    bus: int = 1
    used: int = 0
    busy: int | None = 0
    error: int | None = None


def large() -> Card:
    return Card("NVIDIA GeForce RTX 4090", "GPU-1a2b3c4d-0000-0000-0000-000000000001", 24 * GIB)


def small() -> Card:
    return Card("NVIDIA GeForce RTX 3060", "GPU-8f5e0000-0000-0000-0000-000000000002", 12 * GIB, bus=0x41)


@dataclass
class FakeNvml:
    """What ``pynvml`` says.

    Attributes:
        error: Code of whatever is asked while it is set; None while the driver answers.
        calls: How often each function was called.
        threads: Names of the threads that called.
    """

    cards: list[Card] = field(default_factory=lambda: [large(), small()])
    error: int | None = None
    calls: Counter[str] = field(default_factory=Counter)
    threads: set[str] = field(default_factory=set)
    initialised: int = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
        """Take the place of every function that asks something; returns itself."""
        played = [name for name in dir(self) if name.startswith("nvml")]
        for name in dir(pynvml):
            if name.startswith("nvml") and callable(getattr(pynvml, name)):
                monkeypatch.setattr(pynvml, name, getattr(self, name) if name in played else _unplayed(name))
        return self

    def _called(self, name: str) -> None:
        self.calls[name] += 1
        self.threads.add(threading.current_thread().name)
        if self.error is not None:
            raise pynvml.NVMLError(self.error)
        if name != "nvmlInit" and not self.initialised:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)

    def nvmlInit(self) -> None:
        self._called("nvmlInit")
        self.initialised += 1

    def nvmlShutdown(self) -> None:
        self._called("nvmlShutdown")
        self.initialised -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        self._called("nvmlSystemGetDriverVersion")
        return "580.65.06"

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        self._called("nvmlSystemGetCudaDriverVersion_v2")
        return 13000

    def nvmlDeviceGetCount(self) -> int:
        self._called("nvmlDeviceGetCount")
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Card:
        self._called("nvmlDeviceGetHandleByIndex")
        if not 0 <= index < len(self.cards):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return self._of(self.cards[index])

    def nvmlDeviceGetUUID(self, card: Card) -> str:
        self._called("nvmlDeviceGetUUID")
        return self._of(card).uuid

    def nvmlDeviceGetName(self, card: Card) -> str:
        self._called("nvmlDeviceGetName")
        return self._of(card).name

    def nvmlDeviceGetPciInfo(self, card: Card) -> SimpleNamespace:
        self._called("nvmlDeviceGetPciInfo")
        return SimpleNamespace(domain=0, bus=self._of(card).bus, device=0)

    def nvmlDeviceGetMemoryInfo(self, card: Card) -> SimpleNamespace:
        self._called("nvmlDeviceGetMemoryInfo")
        there = self._of(card)
        return SimpleNamespace(total=there.total, used=there.used, free=there.total - there.used)

    def nvmlDeviceGetUtilizationRates(self, card: Card) -> SimpleNamespace:
        self._called("nvmlDeviceGetUtilizationRates")
        if self._of(card).busy is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return SimpleNamespace(gpu=card.busy, memory=0)

    def _of(self, card: Card) -> Card:
        if card.error is not None:
            raise pynvml.NVMLError(card.error)
        return card


def _unplayed(name: str) -> object:
    def refuse(*_: object) -> None:
        raise AssertionError(f"nobody plays {name}")

    return refuse
