"""A service over a fake engine in which every step of a load can be made to fail or wait, and nothing may leak."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from engines.api import DeviceSpec, Footprint, ModelSpec, ProgressCallback, WaitCallback
from engines.errors import EngineDead
from orchd.machine.devices import Device
from orchd.models.references import model_id
from orchd.models.registry import ModelState
from orchd.pools.pool import Pool
from orchd.queue.tasks import Task, TaskState
from orchd.schemas import Message, TaskRequest
from orchd.service import Service
from orchd.settings.config import PoolConfig
from testkit.fake_engine import FakeEngine, FakeModel, FakeVocab
from testkit.stage import serving

DEADLINE_S = 20.0
SHIFTS = {"a": 0, "b": 1000, "c": 2000}
"""By model: what its vocabulary adds to a character's code."""

Hook = Callable[[str, str, int], None]
"""Called on the loading thread before each step: "vet", "vocab" or "load", the model, the replica."""


class Vocab(FakeVocab):
    """A model's own tokens; a closed one is dead."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def tokenize(self, prompt: str, *, at_most: int | None = None) -> list[int]:
        if self.closes:
            raise EngineDead("closed")
        return [code + SHIFTS[self.name] for code in super().tokenize(prompt)]


class Engine(FakeEngine):
    """Replicas are told apart by the ordinal of their device."""

    def __init__(self, *, gated: bool) -> None:
        super().__init__(gated=gated)
        self.hook: Hook = lambda step, name, replica: None
        self.footprint = Footprint(0, 0, 0)
        self.steps: list[tuple[str, str, int]] = []
        self.of: dict[str, list[FakeModel]] = {}

    def _step(self, step: str, path: Path, replica: int = 0) -> str:
        name = model_id(path)
        self.steps.append((step, name, replica))
        self.hook(step, name, replica)
        return name

    def vet(self, spec: ModelSpec, *, on_wait: WaitCallback | None = None) -> Footprint:
        self._step("vet", spec.path)
        return self.footprint

    def load_vocab(self, path: Path) -> FakeVocab:
        self.vocabs.append(Vocab(self._step("vocab", path)))
        return self.vocabs[-1]

    def load(self, spec: ModelSpec, device: DeviceSpec, *, on_progress: ProgressCallback | None = None) -> FakeModel:
        name = self._step("load", spec.path, device.ordinal)
        model = super().load(spec, device, on_progress=on_progress)
        self.of.setdefault(name, []).append(model)
        return model


@dataclass
class Stage:
    """A pool that serves the model ``a``, and files of ``b`` and ``c`` beside it."""

    engine: Engine
    service: Service
    folder: Path
    pauses: list[float]
    accepted: list[str] = field(default_factory=list)

    @property
    def pools(self) -> Mapping[str, Pool]:
        return self.service.pools

    @property
    def pool(self) -> Pool:
        return self.pools["default"]

    @property
    def serves(self) -> str:
        assert self.pool.model is not None
        return self.pool.model.id

    def current(self) -> list[FakeModel | None]:
        """What each replica starts new tasks on."""
        instances = [replica.slots.instance for replica in self.pool.replicas]
        return [None if instance is None else cast(FakeModel, instance.model) for instance in instances]

    async def submit(self, prompt: str = "x", *, max_tokens: int = 1, **more: Any) -> Task:
        request = TaskRequest(prompt=prompt, max_tokens=max_tokens, **more)
        self.accepted.append((await self.service.submit(request)).task_id)
        return self.task(self.accepted[-1])

    async def submit_messages(self, messages: tuple[Message, ...]) -> Task:
        request = TaskRequest(messages=messages, max_tokens=1)
        self.accepted.append((await self.service.submit(request)).task_id)
        return self.task(self.accepted[-1])

    def task(self, task_id: str) -> Task:
        with self.service.follow(task_id) as task:
            return task

    async def ended(self, *tasks: Task) -> None:
        await until(lambda: all(task.state is TaskState.ENDED for task in tasks), "every task ends")

    def states(self) -> dict[str, str]:
        return {name: state.value for name, state in self.service.models.states().items()}

    async def idle_loader(self) -> None:
        """Whatever the loading thread was given is done, closing included."""
        await self.pool.loader._loader.run(lambda: None)

    async def check_leaks(self) -> None:
        """Handles that nobody uses are closed, once, and the others are not; workers may take a moment."""
        await self.idle_loader()
        await until(lambda: self._closes() == self._expected_closes(), "what is unused is closed")

    def _closes(self) -> list[int]:
        return [m.closes for m in self.engine.models] + [v.closes for v in self.engine.vocabs]

    def _expected_closes(self) -> list[int]:
        used: list[object] = [pool.model.vocab for pool in self.pools.values() if pool.model is not None]
        for pool in self.pools.values():
            used += [instance.model for replica in pool.replicas for instance in replica.instances]
        return [int(one not in used) for one in (*self.engine.models, *self.engine.vocabs)]


def text_of(task: Task) -> str:
    return "".join(data["t"] for kind, data in events_of(task) if kind == "token")


def end_of(task: Task) -> dict[str, Any]:
    kind, data = events_of(task)[-1]
    assert kind == "end"
    return data


def events_of(task: Task) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for frame in task.log.frames:
        _, kind, data = (line.split(": ", 1)[1] for line in frame.decode().rstrip().split("\n"))
        found.append((kind, json.loads(data)))
    return found


async def until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {DEADLINE_S} s"
        await asyncio.sleep(0.002)


@asynccontextmanager
async def staged(
    folder: Path,
    *,
    replicas: int = 2,
    slots: int = 2,
    gated: bool = False,
    mode: str = "auto",
    grace_s: float = 20.0,
    stall_s: float = 60.0,
    ctx: int = 64,
    pools: tuple[str, ...] = ("default",),
    prompt_cache_mib: int = 0,
) -> AsyncIterator[Stage]:
    for name in SHIFTS:
        (folder / f"{name}.gguf").write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(16))
    engine = Engine(gated=gated)
    pauses: list[float] = []

    async def pause(seconds: float) -> None:
        pauses.append(seconds)
        await asyncio.sleep(0.002)

    configs = {
        PoolConfig(
            id=pool_id,
            slots=slots,
            ctx=ctx,
            reload=mode,  # type: ignore[arg-type]
            prompt_cache_mib=prompt_cache_mib,
        ): [Device(f"cpu#{pool_id}{i}", DeviceSpec("cpu", ordinal=i)) for i in range(replicas)]
        for pool_id in pools
    }
    async with serving(
        engine,
        configs,
        capacity=16,
        clock=time.monotonic,
        sleep=pause,
        stall_s=stall_s,
        roots=[folder],
        grace_s=grace_s,
    ) as (service, _):
        stage = Stage(engine, service, folder, pauses)
        for pool in stage.pools.values():
            await pool.load(folder / "a.gguf")
            service.models.activate("a")
        yield stage
        engine.hook = lambda step, name, replica: None
    tasks = [stage.task(task_id) for task_id in stage.accepted]
    assert all(task.state is TaskState.ENDED for task in tasks)
    states = set(stage.service.models.states().values())
    assert states <= {ModelState.ACTIVE, ModelState.RETIRED}
