"""`orchd check`: what a start would find and need, without starting anything.

It goes the way of `orchd.server.serve` up to the point where a model would be loaded, collects what is wrong instead
of stopping at the first, and never loads llama.cpp into this process.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from engines.api import Footprint
from engines.errors import LoadFailed
from engines.llamacpp import build
from engines.llamacpp.vet import vet
from orchd.cli.versions import build_summary, driver_summary
from orchd.errors import ConfigError
from orchd.machine import devices, memory
from orchd.machine.devices import Device
from orchd.machine.memory import gib
from orchd.models import files, references
from orchd.pools.loading import model_spec
from orchd.settings import credentials
from orchd.settings.addresses import resolve
from orchd.settings.config import Config, PoolConfig
from orchd.settings.sources import working_folder


class GpuReport(msgspec.Struct, frozen=True, kw_only=True):
    """A GPU that this process may use."""

    device: str
    uuid: str
    name: str
    memory_bytes: int
    free_bytes: int | None


class PoolReport(msgspec.Struct, frozen=True, kw_only=True):
    """One pool: what it would hold, and where."""

    id: str
    model_id: str | None
    path: str | None
    devices: tuple[str, ...]
    slots: int
    ctx: int
    weights_bytes: int | None = None
    cache_bytes: int | None = None
    buffers_bytes: int | None = None


class MemoryReport(msgspec.Struct, frozen=True, kw_only=True):
    """One memory that pools share: a GPU's, or the machine's (``cpu``)."""

    place: str
    pools: tuple[str, ...]
    need_bytes: int
    free_bytes: int | None
    fits: bool


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that was found."""

    ok: bool
    config: str | None
    listen: str
    token: str
    llama_cpp: str
    driver: str | None
    gpus: tuple[GpuReport, ...]
    pools: tuple[PoolReport, ...]
    memory: tuple[MemoryReport, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]


class Checkup:
    """One look at a configuration and at this machine.

    Args:
        config: The whole configuration.
        environ: For ``ORCHD_TOKEN`` and ``CUDA_VISIBLE_DEVICES``.
        token_file: ``--token-file``.
    """

    def __init__(self, config: Config, environ: Mapping[str, str], *, token_file: Path | None) -> None:
        self._config = config
        self._environ = environ
        self._token_file = token_file
        self._problems: list[str] = []
        self._notes: list[str] = []
        self._needs: dict[str, dict[str, int]] = defaultdict(dict)
        """Bytes by memory, then by pool."""

    def run(self) -> Report:
        """Looks at everything; takes about a second for each model, more for one that has a checksum beside it."""
        server = self._config.server
        gpus = devices.visible(devices.find_gpus(), self._environ)
        placed = self._placed(gpus)
        self._look_at_the_roots()
        with _warnings_to(self._notes):
            pools = tuple(map(self._pool, self._config.pools, placed))
        token = self._token()
        self._look_at_the_address(server.host, server.port)
        in_memory = tuple(self._memory(name, needs) for name, needs in self._needs.items())
        return Report(
            ok=not self._problems,
            config=None if self._config.source is None else str(self._config.source),
            listen=f"{server.host}:{server.port}",
            token=token,
            llama_cpp=build_summary(),
            driver=driver_summary(),
            gpus=tuple(
                GpuReport(
                    device=f"gpu:{gpu.index}",
                    uuid=gpu.uuid,
                    name=gpu.name,
                    memory_bytes=gpu.memory_bytes,
                    free_bytes=memory.free_bytes(f"gpu:{gpu.index}"),
                )
                for gpu in gpus
            ),
            pools=pools,
            memory=in_memory,
            problems=tuple(self._problems),
            notes=tuple(self._notes),
        )

    def _token(self) -> str:
        config, environ = self._config, self._environ
        named = self._token_file or "ORCHD_TOKEN" in environ or config.server.token or config.server.token_file
        try:
            if not named and not os.path.lexists(made_at := credentials.token_path()):
                return f"none yet; the first start creates one in {made_at}"
            return credentials.find_token(config, token_file_flag=self._token_file, environ=environ).origin
        except ConfigError as error:
            self._problems.append(str(error))
            return "not usable"

    def _look_at_the_address(self, host: str, port: int) -> None:
        try:
            resolve(host, port)
            with socket.create_connection((host, port), timeout=1):
                self._notes.append(
                    f"{host}:{port} is already in use; if that is orchd, the memory it holds is not counted as free"
                )
        except ConfigError as error:
            self._problems.append(str(error))
        except OSError:
            pass  # the address is free, as it should be

    def _look_at_the_roots(self) -> None:
        try:
            references.check_roots(map(Path, self._config.models.roots))
        except ConfigError as error:
            self._problems.append(str(error))

    def _placed(self, gpus: list[devices.Gpu]) -> list[list[Device]]:
        gpu_build = build.gpu_backend() is not None
        if gpus and not gpu_build:
            self._notes.append(
                "there are GPUs, but llama.cpp was built for the CPU only; rebuild it with: make BACKEND=cuda setup "
                "(for cards before the RTX 20 series: BACKEND=vulkan)"
            )
        try:
            return devices.assign(
                self._config.pools, gpus, gpu_build=gpu_build, cores=devices.usable_cores(), cpus=devices.crowded_cpus()
            )[0]
        except ConfigError as error:
            self._problems.append(str(error))
            return [[] for _ in self._config.pools]

    def _pool(self, pool: PoolConfig, placed: list[Device]) -> PoolReport:
        path: Path | None = None
        footprint: Footprint | None = None
        try:
            path = self._model_file(pool)
            files.looks_like_gguf(path)
            files.check_digest(path)
            footprint = vet(
                model_spec(pool, path), on_note=lambda note: self._notes.append(f'pool "{pool.id}": {note}')
            )
        except (ConfigError, LoadFailed) as error:
            self._problems.append(f'pool "{pool.id}": {error}')
        if footprint is not None:
            for name, replicas in Counter(map(memory.memory_of, placed)).items():
                self._needs[name][pool.id] = memory.need(footprint, replicas, memory=name)
        return PoolReport(
            id=pool.id,
            model_id=None if path is None else references.model_id(path),
            path=None if path is None else str(path),
            devices=tuple(device.name for device in placed),
            slots=pool.slots,
            ctx=pool.ctx,
            weights_bytes=None if footprint is None else footprint.weights,
            cache_bytes=None if footprint is None else footprint.cache,
            buffers_bytes=None if footprint is None else footprint.buffers,
        )

    def _model_file(self, pool: PoolConfig) -> Path:
        config = self._config
        roots = [Path(root) for root in config.models.roots]
        base = working_folder() if config.source is None else config.source.parent
        return references.resolve_owned(pool.model, base=base, roots=roots)

    def _memory(self, name: str, needs: Mapping[str, int]) -> MemoryReport:
        need, free = sum(needs.values()), memory.free_bytes(name)
        fits = free is None or need <= free
        if not fits:
            assert free is not None
            self._problems.append(
                f"{name} has {gib(free)} free, but {_pools(needs)} {gib(need)}; "
                "use fewer slots, a smaller ctx or a smaller model"
            )
        return MemoryReport(place=name, pools=tuple(needs), need_bytes=need, free_bytes=free, fits=fits)


@contextlib.contextmanager
def _warnings_to(notes: list[str]) -> Iterator[None]:
    """What the parts would log at a start."""
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: notes.append(record.getMessage())  # type: ignore[method-assign]  # all that it does
    log = logging.getLogger("orchd")
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


def _pools(needs: Mapping[str, int]) -> str:
    return f"pool {next(iter(needs))} needs" if len(needs) == 1 else f"pools {', '.join(needs)} together need"
