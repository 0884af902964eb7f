"""A pool: one model, a replica of it on each of its devices, one queue before them."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from engines.errors import LoadFailed, OutOfDeviceMemory
from orchd.errors import TaskError
from orchd.machine.devices import Device
from orchd.machine.telemetry import Telemetry
from orchd.models.active_model import ActiveModel, VettedModel
from orchd.models.prepared import Prepared
from orchd.pools.loading import PoolLoader
from orchd.pools.replica import Instance, Replica
from orchd.pools.reports import ReplicaDown, Report
from orchd.pools.worker import Worker
from orchd.queue.scheduler import Scheduler
from orchd.queue.slots import ReplicaSlots
from orchd.schemas import PoolHealth, ReplicaHealth
from orchd.settings.config import PoolConfig


class PoolState(enum.Enum):
    """Where a pool's model is."""

    LOADING = enum.auto()
    """The first one is on its way."""
    FAILED = enum.auto()
    """The first one could not be loaded; `Pool.failure` says why. A reload may bring one."""
    SERVING = enum.auto()
    SWAPPED_OUT = enum.auto()
    """It was taken down to make room for another; tasks wait."""


class Pool:
    """A model, its replicas and their queue. Event loop thread only.

    Args:
        config: Its settings.
        devices: One replica on each.
        loader: Opens its models and loads them on these devices.
        capacity: Most waiting tasks.
        worker_of: The worker of a device.
        stall_s: A worker that takes longer over a step is not alive.
        clock: Monotonic seconds.
        sleep: Waits so many seconds; for tests.
    """

    def __init__(
        self,
        config: PoolConfig,
        devices: Sequence[Device],
        loader: PoolLoader,
        *,
        capacity: int,
        worker_of: Callable[[Device], Worker],
        stall_s: float,
        clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.id = config.id
        self.config = config
        self.loader = loader
        self.model: ActiveModel | None = None
        self.state = PoolState.LOADING
        self.failure: str | None = None
        """Why its first model could not be loaded, in one sentence without folders."""
        self.reloading = False
        """A `orchd.pools.reload.Reload` is under way."""
        self.takes_tasks = asyncio.Event()
        """Cleared while a reload gets the last prompts ready for its model: new tasks wait then, for the switch."""
        self.takes_tasks.set()
        self.sleep = sleep
        self._first: Path | None = None
        self._closed = asyncio.Event()
        self._lost: dict[int, str] = {}  # replicas whose device CUDA cannot use any more, and NVML's words for it
        self._stall_s = stall_s
        workers = [worker_of(device) for device in devices]
        slots = [ReplicaSlots[Instance](index, config.slots, wake=worker.wake) for index, worker in enumerate(workers)]
        self.scheduler = Scheduler(capacity, slots, clock=clock)
        self.replicas: list[Replica] = []
        for own, device, worker in zip(slots, devices, workers, strict=True):
            replica = Replica(str(own.index), device.name, own, self.scheduler, worker)
            self.replicas.append(replica)
            worker.replicas.append(replica)  # it has not been started

    @property
    def ready(self) -> bool:
        """Whether it can start tasks."""
        return self.model is not None and any(map(self.alive, self.replicas))

    @property
    def stranded(self) -> bool:
        """Whether no replica can start what waits, and none is about to."""
        return self.state is PoolState.SERVING and not self.scheduler.any_ready

    def stalled(self) -> list[Replica]:
        """Replicas whose worker has just turned out to hang, whichever pool's step it hangs in.

        One that moves again asks for tasks, which ends its stall; it is woken, in case it had nothing left to do.
        """
        hanging = []
        for replica in self.replicas:
            hangs = replica.worker.stalled_s() >= self._stall_s
            if hangs and not replica.slots.stalled:
                hanging.append(replica)
            elif replica.slots.stalled and not hangs:
                replica.worker.wake()
        return hanging

    def alive(self, replica: Replica) -> bool:
        """Whether a replica has its model and its worker moves."""
        return replica.slots.ready and replica.worker.stalled_s() < self._stall_s

    # --- models ----------------------------------------------------------------------------------------------------

    @property
    def path(self) -> Path:
        """The file that a reload opens that names none: the model's, or the one that could not be loaded."""
        assert self._first is not None  # nothing is asked of a pool before `load`
        return self._first if self.model is None else self.model.path

    async def load(self, path: Path) -> None:
        """Load its first model. What was loaded is closed again where that fails, and a reload may try again.

        Raises:
            LoadFailed: The file cannot be served; so may anything else be raised that is a defect.
        """
        self._first = path
        try:
            await self._load(path)
        except Exception as error:
            self.failure = one_sentence(error, path)
            self.state = PoolState.FAILED
            raise

    async def _load(self, path: Path) -> None:
        model, instances = await self.loader.load_first(path, self.check_fit)
        self.switch(model, instances, {})
        self.loader.remember(model)

    async def check_fit(self, model: VettedModel, *, leaving: ActiveModel | None = None) -> None:
        """Raise `OutOfDeviceMemory` unless every device has room for its replicas now, or without a model it has."""
        for index, why in self._lost.items():
            raise OutOfDeviceMemory(
                f"{model.path.name} cannot be loaded on {self.replicas[index].device}: NVML reports {why}; reset the "
                "GPU or restart the machine"
            )
        instances = [replica.slots.instance for replica in self.replicas] if leaving is not None else []
        saved = sum(instance.model.saved_bytes for instance in instances if instance is not None)
        await self.loader.check_fit(model, leaving=leaving, leaving_saved=saved)

    def switch(self, model: ActiveModel, instances: Sequence[Instance | None], prompts: Mapping[str, Prepared]) -> None:
        """Serve a model from now on, with these prompts for the waiting tasks: one assignment under one lock.

        A replica whose instance is None has no model.
        """
        self.model = model
        self.failure = None
        self.state = PoolState.SERVING
        self.scheduler.switch(instances, prompts)
        for replica, instance in zip(self.replicas, instances, strict=True):
            if instance is not None:
                replica.worker.adopt(replica, instance)

    async def take_down(self, grace_s: float, late: TaskError) -> list[int]:
        """Stop handing out tasks, let those that run end within the grace, end the rest, close the model everywhere.

        Returns:
            The replicas whose worker hangs: it closes the model when it moves again.
        """
        self.state = PoolState.SWAPPED_OUT
        self.scheduler.switch([None] * len(self.replicas), {})
        for replica in self.replicas:
            replica.worker.wake()  # to close what is idle
        emptied = [asyncio.ensure_future(self.emptied(replica)) for replica in self.replicas]
        try:
            await asyncio.wait(emptied, timeout=grace_s)
            for replica in self.replicas:
                replica.worker.end_tasks(replica, late)
            await asyncio.wait(emptied, timeout=self._stall_s)
            return [index for index, closed in enumerate(emptied) if not closed.done()]
        finally:
            for waiting in emptied:
                waiting.cancel()

    async def emptied(self, replica: Replica) -> None:
        """Return once the replica's worker has closed every model that it had."""
        while replica.instances:
            self._closed.clear()
            await self._closed.wait()

    def note_closed(self) -> None:
        """A worker closed a model."""
        self._closed.set()
        self.loader.trim()

    # --- replicas --------------------------------------------------------------------------------------------------

    def is_lost(self, index: int) -> bool:
        """Whether a replica's GPU is lost; it keeps its model then, see `note_readings`."""
        return index in self._lost

    def note_readings(self, telemetry: Telemetry) -> list[Report]:
        """Let placement know how much memory is free, and take replicas whose GPU is lost out of it.

        Such a replica keeps its model, and its worker is told nothing: CUDA ends the process that calls it then. It
        gets tasks again when NVML says that its GPU is back.

        Returns:
            A report for each replica that was lost just now.
        """
        down: list[Report] = []
        for index, replica in enumerate(self.replicas):
            reading = telemetry.reading(replica.device)
            if reading is not None:
                self.scheduler.note_free_bytes(replica.slots, reading.free_bytes)
            why = telemetry.lost(replica.device)
            if why is None:
                if self._lost.pop(index, None) is not None and replica.slots.instance is not None:
                    self.scheduler.set_ready(replica.slots, ready=True)
                continue
            if index not in self._lost:
                down.append(ReplicaDown(replica, f"NVML reports {why}"))
            self._lost[index] = why
            if replica.slots.ready:
                self.scheduler.set_ready(replica.slots, ready=False)
        return down

    def health(self, *, closing: bool = False) -> PoolHealth:
        """A snapshot; of a server that is ``closing``, or not."""
        return PoolHealth(
            id=self.id,
            model_id=None if self.model is None else self.model.id,
            ctx=self.config.ctx,
            ready=self.ready and not closing,
            replicas=tuple(
                ReplicaHealth(
                    id=replica.id,
                    device=replica.device,
                    alive=self.alive(replica),
                    slots=replica.slots.total,
                    busy=replica.slots.busy,
                )
                for replica in self.replicas
            ),
        )


def one_sentence(error: Exception, path: Path) -> str:
    """What a failed load may tell clients: llama.cpp quotes the path it was given, and a defect says anything."""
    if not isinstance(error, LoadFailed):
        return f"{path.name} could not be loaded; see the server's log"
    return " ".join(str(error).replace(f"{path.parent}/", "").split())
