"""A pool: one model, a replica of it on each of its devices, one queue before them."""

from __future__ import annotations

import array
import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from engines.api import Footprint, ModelSpec
from engines.errors import LoadFailed
from orchd import memory, models
from orchd.active import ActiveModel
from orchd.config import PoolConfig
from orchd.devices import Device
from orchd.errors import TaskError
from orchd.loader import Loader
from orchd.scheduler import Scheduler, Seat
from orchd.schemas import PoolHealth, ReplicaHealth
from orchd.worker import Host, Replica, Worker

_log = logging.getLogger(__name__)

RECOVERY_PAUSE_S = 1.0
MAX_RECOVERY_PAUSE_S = 60.0


class Pool:
    """Event loop thread only.

    Args:
        config: Its settings.
        devices: One replica on each.
        capacity: Most waiting tasks.
        worker_of: The worker of a device.
        loader: Loads its models.
        step_target_s: See `engines.api.ModelSpec`.
        stall_s: A worker that takes longer over a step is not alive.
        clock: Monotonic seconds.
        sleep: Waits so many seconds; for tests.
    """

    def __init__(
        self,
        config: PoolConfig,
        devices: list[Device],
        *,
        capacity: int,
        worker_of: Callable[[Device], Worker],
        loader: Loader,
        step_target_s: float,
        stall_s: float,
        clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.id = config.id
        self.config = config
        self.model: ActiveModel | None = None
        self.loading = True
        """Its first model is not there yet."""
        self.reloading = False
        """A `orchd.reload.Reload` is under way."""
        self.away = False
        """Its model was taken down to make room for another; tasks wait."""
        self.sleep = sleep
        self._closed = asyncio.Event()
        self._devices = devices
        self._loader = loader
        self._step_target_s = step_target_s
        self._stall_s = stall_s
        seats = [Seat(index, config.slots) for index in range(len(devices))]
        self.scheduler = Scheduler(capacity, seats, clock=clock)
        self.replicas = [
            Replica(str(seat.index), device.name, seat, self.scheduler)
            for seat, device in zip(seats, devices, strict=True)
        ]
        self.workers = [worker_of(device) for device in devices]
        for replica, worker in zip(self.replicas, self.workers, strict=True):
            worker.replicas.append(replica)  # it has not been started

    @property
    def ready(self) -> bool:
        """Whether it can start tasks."""
        return self.model is not None and any(self.alive(index) for index in range(len(self.replicas)))

    def alive(self, index: int) -> bool:
        """Whether a replica has its model and its worker moves."""
        return self.replicas[index].seat.ready and self.workers[index].stalled_s() < self._stall_s

    # --- models ----------------------------------------------------------------------------------------------------

    async def load(self, path: Path) -> None:
        """Load its first model. Raises `engines.errors.LoadFailed`; what was loaded is closed again."""
        self.check_fit(path, await self.vet(path))
        model = await self.open(path)
        try:
            hosts = await self.load_hosts(path)
        except BaseException:
            model.vocab.close()
            raise
        self.switch(model, hosts, {})
        self.loading = False

    async def vet(self, path: Path) -> Footprint:
        """Look at a file from outside, then open it where it can do no harm. Raises `LoadFailed`."""
        before = models.fingerprint(path)
        await self._loader.run(lambda: models.looks_like_gguf(path))
        await self._loader.run(lambda: models.check_digest(path))
        footprint = await self._loader.run(lambda: self._loader.engine.vet(self._spec(path)))
        if models.fingerprint(path) != before:
            raise LoadFailed(f"{path.name} changed while it was being vetted; ask again when it is complete")
        return footprint

    async def open(self, path: Path) -> ActiveModel:
        """A model's name and tokenizer. Raises `LoadFailed`."""
        return ActiveModel(models.model_id(path), path, await self._loader.vocab(path))

    async def load_hosts(self, path: Path) -> list[Host]:
        """A handle for every replica, or `LoadFailed` and none."""
        hosts: list[Host] = []
        try:
            for index in range(len(self.replicas)):
                hosts.append(await self._load_host(index, path))
        except BaseException:
            for host in hosts:
                host.model.close()
            raise
        return hosts

    async def _load_host(self, index: int, path: Path) -> Host:
        device = self._devices[index]
        label = f"{self.id}/{index} {models.model_id(path)} on {device.name}"
        return Host(await self._loader.model(self._spec(path), device.spec, label=label))

    def _spec(self, path: Path) -> ModelSpec:
        config = self.config
        return ModelSpec(
            path,
            slots=config.slots,
            ctx=config.ctx,
            batch=config.batch,
            flash_attn=config.flash_attn,
            cache_type_k=config.cache_type_k,
            cache_type_v=config.cache_type_v,
            mmap=config.mmap,
            step_target_s=self._step_target_s,
        )

    def check_fit(self, path: Path, footprint: Footprint) -> None:
        """Raise `OutOfDeviceMemory` unless every device has room for its replicas now."""
        places = Counter(memory.place_of(device) for device in self._devices)
        needs = {place: memory.need(footprint, replicas) for place, replicas in places.items()}
        memory.check_fit(path.name, needs, {place: memory.free_bytes(place) for place in places})

    def switch(self, model: ActiveModel, hosts: list[Host], tokens: Mapping[str, array.array[int]]) -> None:
        """Serve a model from now on, with these prompts for the waiting tasks: one assignment under one lock."""
        self.model = model
        self.away = False
        self.scheduler.switch(hosts, tokens)
        for replica, worker, host in zip(self.replicas, self.workers, hosts, strict=True):
            worker.adopt(replica, host)

    async def take_down(self, grace_s: float, late: TaskError) -> None:
        """Stop handing out tasks, let those that run end within the grace, end the rest, close the model everywhere."""
        self.away = True
        self.scheduler.switch([None] * len(self.replicas), {})
        self.wake()
        emptied = [asyncio.ensure_future(self._emptied(replica)) for replica in self.replicas]
        try:
            await asyncio.wait(emptied, timeout=grace_s)
            for replica, worker in zip(self.replicas, self.workers, strict=True):
                worker.end_tasks(replica, late)
            await asyncio.wait(emptied)
        finally:
            for waiting in emptied:
                waiting.cancel()

    async def _emptied(self, replica: Replica) -> None:
        while replica.hosts:
            self._closed.clear()
            await self._closed.wait()

    def note_closed(self) -> None:
        """A worker closed a model."""
        self._closed.set()

    # --- replicas --------------------------------------------------------------------------------------------------

    async def recover(self, index: int) -> None:
        """Bring a replica that was given up back, after a pause that doubles each time it does not last."""
        replica = self.replicas[index]
        pause_s = min(RECOVERY_PAUSE_S * 2 ** max(0, replica.setbacks - 1), MAX_RECOVERY_PAUSE_S)
        while True:
            await self.sleep(pause_s)
            if replica.seat.ready:
                return  # a reload was quicker
            if self.reloading:
                continue
            assert self.model is not None  # it had one, or no replica could have gone down
            model = self.model
            try:
                host = await self._load_host(index, model.path)
            except LoadFailed as error:
                pause_s = min(2 * pause_s, MAX_RECOVERY_PAUSE_S)
                _log.error("pool %s, replica %d is not back: %s; next try in %g s", self.id, index, error, pause_s)
                continue
            if self.reloading or replica.seat.ready or self.model is not model:
                host.model.close()
                continue
            self.scheduler.bring_back(replica.seat, host)
            self.workers[index].adopt(replica, host)
            _log.warning("pool %s, replica %d is back", self.id, index)
            return

    def wake(self) -> None:
        """Wake every worker: there may be something to take."""
        for worker in self.workers:
            worker.wake()

    def health(self) -> PoolHealth:
        """A snapshot."""
        return PoolHealth(
            id=self.id,
            model_id=None if self.model is None else self.model.id,
            ready=self.ready,
            replicas=tuple(
                ReplicaHealth(
                    id=replica.id,
                    device=replica.device,
                    alive=self.alive(index),
                    slots=replica.seat.slots,
                    busy=replica.seat.busy,
                )
                for index, replica in enumerate(self.replicas)
            ),
        )
