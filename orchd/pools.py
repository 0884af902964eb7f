"""A pool: one model, a replica of it on each of its devices, one queue before them."""

from __future__ import annotations

import array
import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from engines.api import ModelSpec, Vocab
from engines.errors import InvalidPrompt, LoadFailed
from orchd import models
from orchd.config import PoolConfig
from orchd.devices import Device
from orchd.errors import InvalidParams
from orchd.loader import Loader
from orchd.scheduler import Scheduler, Seat
from orchd.schemas import PoolHealth, ReplicaHealth, TaskRequest
from orchd.worker import Host, Replica, Worker

_log = logging.getLogger(__name__)

RECOVERY_PAUSE_S = 1.0
MAX_RECOVERY_PAUSE_S = 60.0


@dataclass(frozen=True, eq=False)
class ActiveModel:
    """What a pool serves.

    Attributes:
        id: In health, metrics and ``model_ref``.
        path: Its file.
        vocab: Its tokenizer, shared by every replica.
    """

    id: str
    path: Path
    vocab: Vocab

    def tokenize(self, request: TaskRequest, *, ctx: int) -> array.array[int]:
        """The request's prompt in this model's tokens.

        Raises:
            InvalidParams: The model refuses it, or it does not fit into a slot together with its output.
        """
        try:
            if request.messages is not None:
                tokens = self.vocab.tokenize_chat(
                    [{"role": m.role, "content": m.content} for m in request.messages]
                )
            else:
                tokens = self.vocab.tokenize(request.prompt or "")
        except InvalidPrompt as error:
            raise InvalidParams(str(error)) from None
        if len(tokens) + request.max_tokens > ctx:
            raise InvalidParams(
                f"the prompt's {len(tokens)} tokens and max_tokens {request.max_tokens} do not fit into "
                f"a slot's context of {ctx}; shorten the prompt or lower max_tokens"
            )
        return array.array("i", tokens)


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
        self._devices = devices
        self._loader = loader
        self._step_target_s = step_target_s
        self._stall_s = stall_s
        self._sleep = sleep
        seats = [Seat(index, config.slots) for index in range(len(devices))]
        self.scheduler = Scheduler(capacity, seats, clock=clock)
        self.replicas = [
            Replica(str(seat.index), device.name, seat, self.scheduler)
            for seat, device in zip(seats, devices, strict=True)
        ]
        self.workers = [worker_of(device) for device in devices]
        for replica, worker in zip(self.replicas, self.workers, strict=True):
            worker.do(lambda worker=worker, replica=replica: worker.replicas.append(replica))  # type: ignore[misc]

    @property
    def ready(self) -> bool:
        """Whether it can start tasks."""
        return self.model is not None and any(self.alive(index) for index in range(len(self.replicas)))

    def alive(self, index: int) -> bool:
        """Whether a replica has its model and its worker moves."""
        return self.replicas[index].seat.ready and self.workers[index].stalled_s() < self._stall_s

    def spec(self, path: Path) -> ModelSpec:
        """The shape in which the pool holds a model."""
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

    async def load(self, path: Path) -> None:
        """Load its first model on every replica. Raises `engines.errors.LoadFailed`; what was loaded is closed again."""
        await self._loader.run(lambda: models.looks_like_gguf(path))
        await self._loader.run(lambda: models.check_digest(path))
        active = ActiveModel(models.model_id(path), path, await self._loader.vocab(path))
        hosts: list[Host] = []
        try:
            for index in range(len(self.replicas)):
                hosts.append(await self.load_host(index, path))
        except BaseException:
            for host in hosts:
                host.model.close()
            active.vocab.close()
            raise
        self.model = active
        for index, host in enumerate(hosts):
            await self.bring_up(index, host)
        self.loading = False

    async def load_host(self, index: int, path: Path) -> Host:
        """Load a model for one replica; it does not get tasks yet. Raises `engines.errors.LoadFailed`."""
        device = self._devices[index]
        label = f"{self.id}/{index} {models.model_id(path)} on {device.name}"
        return Host(await self._loader.model(self.spec(path), device.spec, label=label))

    async def bring_up(self, index: int, host: Host) -> None:
        """Hand a replica's worker a model, and let it take tasks."""
        replica = self.replicas[index]
        loop = asyncio.get_running_loop()
        taken = loop.create_future()

        def take() -> None:
            replica.hosts.append(host)
            replica.seat.host = host
            replica.scheduler.set_ready(replica.seat, ready=True)
            loop.call_soon_threadsafe(taken.set_result, None)

        self.workers[index].do(take)
        await taken

    async def recover(self, index: int) -> None:
        """Bring a replica that was given up back, after a pause that doubles each time it does not last."""
        pause_s = min(RECOVERY_PAUSE_S * 2 ** (self.replicas[index].setbacks - 1), MAX_RECOVERY_PAUSE_S)
        while True:
            await self._sleep(pause_s)
            assert self.model is not None  # it had one, or no replica could have gone down
            try:
                host = await self.load_host(index, self.model.path)
            except LoadFailed as error:
                pause_s = min(2 * pause_s, MAX_RECOVERY_PAUSE_S)
                _log.error(
                    "pool %s, replica %d is not back: %s; next try in %g s", self.id, index, error, pause_s
                )
                continue
            await self.bring_up(index, host)
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
