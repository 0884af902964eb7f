"""A pool: one model, a replica of it on each of its devices, one queue before them."""

from __future__ import annotations

import array
import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

from engines.api import ModelSpec
from engines.errors import LoadFailed, OutOfDeviceMemory
from orchd import memory, models
from orchd.active import ActiveModel
from orchd.config import PoolConfig
from orchd.devices import Device
from orchd.errors import TaskError
from orchd.loader import Loader
from orchd.scheduler import Scheduler, Seat
from orchd.schemas import PoolHealth, ReplicaHealth
from orchd.telemetry import Telemetry
from orchd.worker import Host, Replica, ReplicaDown, Worker

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
        self._lost: dict[int, str] = {}  # replicas whose device CUDA cannot use any more, and NVML's words for it
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

    def stalled(self) -> list[int]:
        """Replicas whose worker has been over a step for too long, and of which the scheduler does not know yet."""
        return [
            index
            for index, (replica, worker) in enumerate(zip(self.replicas, self.workers, strict=True))
            if replica.seat.running and not replica.seat.stalled and worker.stalled_s() >= self._stall_s
        ]

    def alive(self, index: int) -> bool:
        """Whether a replica has its model and its worker moves."""
        return self.replicas[index].seat.ready and self.workers[index].stalled_s() < self._stall_s

    # --- models ----------------------------------------------------------------------------------------------------

    async def load(self, path: Path) -> None:
        """Load its first model. Raises `engines.errors.LoadFailed`; what was loaded is closed again."""
        model = await self.open(path)
        try:
            async with self.loading_turn:
                await self.check_fit(model)
                self.switch(model, await self.load_hosts(model), {})
        except BaseException:
            self.discard(model)
            raise
        self.loading = False

    @property
    def loading_turn(self) -> asyncio.Lock:
        """To be held from `check_fit` until the model is loaded."""
        return self._loader.turn

    async def open(self, path: Path) -> ActiveModel:
        """Look at a file from outside, then where it can do no harm, then open its tokenizer. Raises `LoadFailed`."""
        fingerprint = models.fingerprint(path)
        await self._loader.run(lambda: models.looks_like_gguf(path))
        await self._loader.run(lambda: models.check_digest(path, on_progress=self._digest_progress(path)))
        footprint = await self._loader.vet(self._spec(path))
        if models.fingerprint(path) != fingerprint:
            raise LoadFailed(f"{path.name} changed while it was being vetted; ask again when it is complete")
        return ActiveModel(
            models.model_id(path), path, await self._loader.vocab(path), footprint=footprint, fingerprint=fingerprint
        )

    def _digest_progress(self, path: Path) -> Callable[[float], None]:
        """Logs every tenth of the way; called on the loading thread."""
        tenth = 0

        def log(share: float) -> None:
            nonlocal tenth
            self._loader.check_open()
            if int(share * 10) > tenth:
                tenth = int(share * 10)
                _log.info("pool %s: %d %% of %s compared with its checksum", self.id, 10 * tenth, path.name)

        return log

    def discard(self, model: ActiveModel) -> None:
        """Close the tokenizer of a model that it does not serve."""
        self._loader.discard(model.vocab)

    def discard_hosts(self, hosts: Iterable[Host | None]) -> None:
        """Close handles that no worker was given."""
        self._loader.discard(*(host.model for host in hosts if host is not None))

    async def load_hosts(self, model: ActiveModel, *, without: Collection[int] = ()) -> list[Host | None]:
        """A handle for every replica but some, or `LoadFailed` and none."""
        hosts: list[Host | None] = []
        try:
            for index in range(len(self.replicas)):
                hosts.append(None if index in without else await self._load_host(index, model))
        except BaseException:
            self.discard_hosts(hosts)
            raise
        return hosts

    async def _load_host(self, index: int, model: ActiveModel) -> Host:
        device = self._devices[index]
        label = f"{self.id}/{index} {model.id} on {device.name}"
        model.check_unchanged()
        try:
            host = Host(await self._loader.model(self._spec(model.path), device.spec, label=label))
        except LoadFailed as error:
            if len(self.replicas) == 1:
                raise
            raise type(error)(f"{error} (replica {index} on {device.name})") from None
        try:
            model.check_unchanged()
        except LoadFailed:
            self._loader.discard(host.model)
            raise
        return host

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
            swa_full=config.swa_full,
            mmap=config.mmap,
            step_target_s=self._step_target_s,
        )

    async def check_fit(self, model: ActiveModel, *, leaving: ActiveModel | None = None) -> None:
        """Raise `OutOfDeviceMemory` unless every device has room for its replicas now, or without a model it has."""
        for index, why in self._lost.items():
            raise OutOfDeviceMemory(
                f"{model.path.name} cannot be loaded on {self._devices[index].name}: NVML says {why}; reset the GPU or "
                "restart the machine"
            )
        places = Counter(memory.place_of(device) for device in self._devices)
        needs = {place: memory.need(model.footprint, replicas, place=place) for place, replicas in places.items()}
        free = await self._loader.run(lambda: {place: memory.free_bytes(place) for place in places})
        freed = {} if leaving is None else {place: leaving.footprint.total * n for place, n in places.items()}
        memory.check_fit(model.path.name, needs, free, leaving=freed)

    def switch(self, model: ActiveModel, hosts: Sequence[Host | None], tokens: Mapping[str, array.array[int]]) -> None:
        """Serve a model from now on, with these prompts for the waiting tasks: one assignment under one lock.

        A replica whose host is None has no model.
        """
        self.model = model
        self.away = False
        self.scheduler.switch(hosts, tokens)
        for replica, worker, host in zip(self.replicas, self.workers, hosts, strict=True):
            if host is not None:
                worker.adopt(replica, host)

    async def take_down(self, grace_s: float, late: TaskError) -> list[int]:
        """Stop handing out tasks, let those that run end within the grace, end the rest, close the model everywhere.

        Returns:
            The replicas whose worker hangs: it closes the model when it moves again.
        """
        self.away = True
        self.scheduler.switch([None] * len(self.replicas), {})
        self.wake()
        emptied = [asyncio.ensure_future(self._emptied(replica)) for replica in self.replicas]
        try:
            await asyncio.wait(emptied, timeout=grace_s)
            for replica, worker in zip(self.replicas, self.workers, strict=True):
                worker.end_tasks(replica, late)
            await asyncio.wait(emptied, timeout=self._stall_s)
            return [index for index, closed in enumerate(emptied) if not closed.done()]
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
        self._loader.trim()

    # --- replicas --------------------------------------------------------------------------------------------------

    async def recover(self, index: int) -> None:
        """Bring a replica that was given up back, after a pause that doubles each time it does not last."""
        replica = self.replicas[index]
        if index in self._lost:
            return  # it has its model still; see `note_readings`
        if not replica.seat.ready:
            await self._emptied(replica)  # what it had may still take the memory
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
                host = await self._load_host(index, model)
            except Exception as error:
                pause_s = min(2 * pause_s, MAX_RECOVERY_PAUSE_S)
                _log.error("pool %s, replica %d is not back: %s; next try in %g s", self.id, index, error, pause_s)
                continue
            if self.reloading or replica.seat.ready or self.model is not model:
                self._loader.discard(host.model)
                continue
            self.scheduler.bring_back(replica.seat, host)
            self.workers[index].adopt(replica, host)
            _log.warning("pool %s, replica %d is back", self.id, index)
            return

    def note_readings(self, telemetry: Telemetry) -> list[ReplicaDown]:
        """Let placement know how much memory is free, and take replicas whose GPU is lost out of it.

        Such a replica keeps its model, and its worker is told nothing: CUDA ends the process that calls it then. It
        gets tasks again when NVML says that its GPU is back.

        Returns:
            A report for each replica that was lost just now.
        """
        down = []
        for index, replica in enumerate(self.replicas):
            reading = telemetry.reading(replica.device)
            if reading is not None:
                replica.seat.free_bytes = reading.free_bytes  # one number, and placement only reads it
            why = telemetry.lost(replica.device)
            if why is None:
                if self._lost.pop(index, None) is not None and replica.seat.host is not None:
                    self.scheduler.set_ready(replica.seat, ready=True)
                    self.wake()
                continue
            if index not in self._lost:
                down.append(ReplicaDown(replica, f"NVML says {why}"))
            self._lost[index] = why
            if replica.seat.ready:
                self.scheduler.set_ready(replica.seat, ready=False)
                self.wake()
        return down

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
