"""The composition root: every part of a server, put together, started side by side, and taken apart in reverse."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path

from engines.api import Engine, ModelSpec
from engines.errors import LoadFailed, OutOfDeviceMemory
from orchd.errors import ConfigError
from orchd.machine.devices import Device
from orchd.machine.telemetry import PERIOD_S, Telemetry
from orchd.models import references
from orchd.models.loader import Loader
from orchd.models.vetted import Vetted
from orchd.observer import Guarded, Observer, PoolSummary, Summary
from orchd.pools.loading import PoolLoader
from orchd.pools.pool import Pool
from orchd.pools.worker import Worker
from orchd.service import Service
from orchd.settings.config import Config
from orchd.settings.credentials import Credentials

_log = logging.getLogger(__name__)

SWEEP_S = 0.25
"""How often abandoned tasks are cancelled and old ones forgotten."""

STEP_SHARE = 1 / 20
"""Of the time after which a worker counts as hanging: the longest step to aim at."""

JOIN_S = 5.0
"""How long workers have at the end to close their models."""

FIRST_LOOK_S = 2.0
"""How long the start waits to know the GPUs' memory and load; a driver that hangs does not hold it up."""


class Server:
    """One process's parts, put together and taken apart in reverse.

    Args:
        config: The whole configuration.
        credentials: The token.
        engine: Loads models.
        placed: Devices of each pool, in the order of the configuration.
        observer: Is told how the start and the stop go.
        vetted: Remembers models' files between two starts; None remembers none.
    """

    def __init__(
        self,
        config: Config,
        credentials: Credentials,
        engine: Engine,
        placed: list[list[Device]],
        observer: Observer,
        *,
        vetted: Vetted | None = None,
    ) -> None:
        self._config = config
        self._credentials = credentials
        self._engine = engine
        self._placed = placed
        self._observer = Guarded(observer)
        self._vetted = vetted
        self.left_behind = False
        """Whether a thread of this process hangs in native code, where nothing can end it."""
        self._workers: dict[str, Worker] = {}
        self._telemetry = Telemetry({device.name for pool in placed for device in pool}, clock=time.monotonic)

    async def run(self, owned: list[Path], listening: socket.socket, *, stop: asyncio.Event | None = None) -> int:
        """Serve on a socket, each pool with its model, until ``stop`` is set; returns the exit code.

        Raises:
            ConfigError: A model cannot be used.
        """
        stop = stop or asyncio.Event()
        loader = Loader(self._engine, self._observer)
        try:
            service = self._service(loader, owned)
            self._telemetry.start()
            await asyncio.to_thread(self._telemetry.await_look, FIRST_LOOK_S)
            async with (
                _begun(self._load(service, owned)) as loading,
                self._http(service, listening),
                _repeating(service.sweep, SWEEP_S),
                _repeating(lambda: self._note_readings(service), PERIOD_S),
            ):
                stopped = asyncio.create_task(stop.wait())
                try:
                    await asyncio.wait({loading, stopped}, return_when=asyncio.FIRST_COMPLETED)
                    if not stopped.done():
                        loading.result()
                        self._observer.ready(self._summary(service, listening))
                        await stopped
                finally:
                    loading.cancel()
                self._observer.stopping(service.running)
                await service.shut_down(self._config.server.shutdown_grace_s)
                service.end_threads()
        finally:
            for worker in self._workers.values():
                worker.stop()
            await asyncio.to_thread(self._join, loader)  # may take a while, and a second signal must be heard
            await asyncio.to_thread(self._telemetry.close)
        return 0

    def _service(self, loader: Loader, owned: list[Path]) -> Service:
        config = self._config
        roots = [Path(root) for root in config.models.roots] + [
            root for path in owned for root in references.roots_of(path)
        ]
        target_s, bound_s = config.workers.step_target_ms / 1000, config.workers.stall_s * STEP_SHARE
        pools = {
            pool.id: Pool(
                pool,
                placed,
                PoolLoader(
                    pool,
                    placed,
                    loader,
                    step_target_s=min(target_s, bound_s),
                    lone_step_s=min(max(target_s, ModelSpec.lone_step_s), bound_s),
                    vetted=self._vetted,
                ),
                capacity=config.queue.capacity,
                worker_of=self._worker_of,
                stall_s=config.workers.stall_s,
                clock=time.monotonic,
            )
            for pool, placed in zip(config.pools, self._placed, strict=True)
        }
        service = Service(
            pools,
            config.tasks,
            roots=list(dict.fromkeys(roots)),
            grace_s=config.server.shutdown_grace_s,
            clock=time.monotonic,
        )
        for worker in self._workers.values():
            worker.start(service.post)
        return service

    def _worker_of(self, device: Device) -> Worker:
        if device.name not in self._workers:
            self._workers[device.name] = Worker(device.name, clock=time.monotonic)
        return self._workers[device.name]

    def _note_readings(self, service: Service) -> None:
        down = [report for pool in service.pools.values() for report in pool.note_readings(self._telemetry)]
        if down:
            service.post(down)

    @contextlib.asynccontextmanager
    async def _http(self, service: Service, listening: socket.socket) -> AsyncIterator[None]:
        await asyncio.to_thread(_import_web)
        from orchd.http.app import create_app
        from orchd.http.connection import serving
        from orchd.metrics import Metrics

        metrics = Metrics(service, self._engine.version, self._telemetry)
        app = create_app(
            service,
            self._config.server,
            token=self._credentials.token,
            metrics=metrics,
            address=listening.getsockname()[0],
        )
        async with serving(app, listening):
            yield

    async def _load(self, service: Service, owned: list[Path]) -> None:
        """Load each pool's model. One that cannot be loaded is left out where another can.

        Raises:
            ConfigError: None can be loaded.
        """
        failures: list[str] = []
        for pool, path in zip(service.pools.values(), owned, strict=True):
            try:
                await pool.load(path)
            except LoadFailed as error:
                remedy = (
                    "" if isinstance(error, OutOfDeviceMemory) else f" ({path}); use a GGUF file that generates text"
                )
                failures.append(f'pool "{pool.id}": {error}{remedy}')
            except Exception:
                if len(owned) == 1:
                    raise
                _log.exception("internal error while loading the model of pool %s", pool.id)
                failures.append(f'pool "{pool.id}": {pool.failure}')
            else:
                service.models.activate(references.model_id(path))
                continue
            if len(owned) > 1:
                _log.error("%s", failures[-1])
        if len(failures) == len(owned):
            raise ConfigError("; ".join(failures))

    def _join(self, loader: Loader) -> None:
        """Wait for the threads to end; those that hang are left behind."""
        deadline = time.monotonic() + JOIN_S  # workers have it while the load has its own
        if not loader.close():
            self.left_behind = True
            _log.error("a model load hangs and is abandoned")
        for worker in self._workers.values():
            if not worker.join(max(0.0, deadline - time.monotonic())):
                self.left_behind = True
                _log.error("worker %s hangs in a step and is abandoned", worker.device)

    def _summary(self, service: Service, listening: socket.socket) -> Summary:
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        origin = self._credentials.origin
        return Summary(
            url=f"http://{shown}:{port}",
            token_origin=f"in {origin}",
            token_file=self._credentials.file,
            pools=tuple(
                PoolSummary(
                    pool.id,
                    pool.model.id if pool.model is not None else "",
                    tuple(replica.device for replica in pool.replicas),
                    pool.config.slots,
                    pool.config.ctx,
                    pool.failure,
                )
                for pool in service.pools.values()
            ),
        )


def _import_web() -> None:
    """Import what answers requests: a third of what a start imports, while the first model loads."""
    for module in ("orchd.http.app", "orchd.http.connection", "orchd.metrics"):
        importlib.import_module(module)


@contextlib.asynccontextmanager
async def _begun(work: Coroutine[None, None, None]) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()


@contextlib.asynccontextmanager
async def _repeating(call: Callable[[], None], every_s: float) -> AsyncIterator[None]:
    async def repeat() -> None:
        while True:
            await asyncio.sleep(every_s)
            try:
                call()
            except Exception:
                _log.exception("a housekeeping task failed; it will run again")

    task = asyncio.create_task(repeat())
    try:
        yield
    finally:
        task.cancel()
