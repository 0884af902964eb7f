"""Hooks that make a reload fail or wait, and what must hold after one that failed."""

from __future__ import annotations

import threading

import pytest

from engines.errors import LoadFailed
from orchd.errors import ReloadFailed
from tests.reload.stage import Hook, Stage, text_of

B_STEPS = [("vet", 0), ("vocab", 0), ("load", 0), ("load", 1)]
"""Every step of loading ``b`` on two replicas."""


def failing(at: str, name: str, replica: int = 0, *, error: Exception | None = None) -> Hook:
    def hook(step: str, model: str, index: int) -> None:
        if (step, model, index) == (at, name, replica):
            raise error or LoadFailed(f"{name}.gguf is bad at {step} {index}")

    return hook


def waiting(at: str, name: str, replica: int = 0) -> tuple[Hook, threading.Event, threading.Event]:
    """A hook that waits at a step, what tells that it is there, and what lets it go on."""
    there, go_on = threading.Event(), threading.Event()

    def hook(step: str, model: str, index: int) -> None:
        if (step, model, index) == (at, name, replica):
            there.set()
            assert go_on.wait(20)

    return hook, there, go_on


async def refused(stage: Stage, ref: str | None = "b", *, pool: str = "default") -> str:
    with pytest.raises(ReloadFailed) as caught:
        await stage.service.reload(pool, ref)
    message = str(caught.value)
    assert str(stage.folder) not in message
    assert "\n" not in message
    return message


async def undisturbed(stage: Stage, model: str = "a") -> None:
    """It serves on every replica, its state says so, and nothing is left of the attempt."""
    assert stage.serves == model
    assert stage.states()[model] == "Active"
    assert all(current is not None and not current.closes for current in stage.current())
    tasks = [await stage.submit("x") for _ in range(4)]
    await stage.ended(*tasks)
    first = ord("x") + {"a": 0, "b": 1000}[model]
    assert [text_of(task) for task in tasks] == [f"<{first}.0>"] * 4
    assert stage.service.health().status == "ok"
    await stage.check_leaks()
