"""`orchd check`: what a start would find and need, without starting anything.

It goes the way of `orchd.serve.serve` up to the point where a model would be loaded, collects what is wrong instead
of stopping at the first, and never loads llama.cpp into this process.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from engines.api import Footprint
from engines.errors import LoadFailed
from engines.llamacpp import build
from engines.llamacpp.vet import vet
from orchd.cli.findings import Findings, GpuFindings, MemoryFindings, PoolFindings
from orchd.cli.versions import build_summary, driver_summary
from orchd.errors import ConfigError
from orchd.machine import cores, devices, gpus, memory
from orchd.machine.devices import Device
from orchd.machine.gpus import Gpu
from orchd.machine.memory import gib
from orchd.models import files, references
from orchd.pools.loading import model_spec
from orchd.process import listen
from orchd.settings import credentials
from orchd.settings.addresses import url_of
from orchd.settings.config import Config, PoolConfig
from orchd.settings.running import running_servers
from orchd.settings.sources import working_folder


class Checkup:
    """One look at a configuration and at this machine.

    Args:
        config: What can be used of the configuration.
        environ: For ``ORCHD_TOKEN`` and ``CUDA_VISIBLE_DEVICES``.
        token_file: ``--token-file``.
        mistakes: What is wrong in the configuration itself.
    """

    def __init__(
        self, config: Config, environ: Mapping[str, str], *, token_file: Path | None, mistakes: Sequence[str] = ()
    ) -> None:
        self._config = config
        self._environ = environ
        self._token_file = token_file
        self._problems = [*mistakes]
        self._notes: list[str] = []
        self._needs: dict[str, dict[str, int]] = defaultdict(dict)
        """Bytes by memory, then by pool."""

    def run(self) -> Findings:
        """Looks at everything; takes about a second for each model, more for one that has a checksum beside it."""
        server = self._config.server
        there = gpus.visible(gpus.find_gpus(), self._environ)
        placed = self._placed(there)
        self._look_at_the_roots()
        with _warnings_to(self._notes):
            pools = tuple(map(self._pool, self._config.pools, placed))
        token = self._token()
        self._look_at_the_address(server.host, server.port)
        in_memory = tuple(self._memory(name, needs) for name, needs in self._needs.items())
        return Findings(
            ok=not self._problems,
            config=None if self._config.source is None else str(self._config.source),
            listen=f"{server.host}:{server.port}",
            token=token,
            llama_cpp=build_summary(),
            driver=driver_summary(),
            gpus=tuple(
                GpuFindings(
                    device=f"gpu:{gpu.index}",
                    uuid=gpu.uuid,
                    name=gpu.name,
                    memory_bytes=gpu.memory_bytes,
                    free_bytes=memory.free_bytes(f"gpu:{gpu.index}"),
                )
                for gpu in there
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
                folder = next(parent for parent in made_at.parents if parent.exists())
                if not os.access(folder, os.W_OK | os.X_OK):
                    raise ConfigError(f"a token cannot be created in {folder}; make it writable, or set ORCHD_TOKEN")
                return f"none yet; the first start creates one in {made_at}"
            return credentials.find_token(config, token_file_flag=self._token_file, environ=environ).origin
        except ConfigError as error:
            self._problems.append(str(error))
            return "not usable"

    def _look_at_the_address(self, host: str, port: int) -> None:
        try:
            listen(host, port).close()
        except ConfigError as error:
            self._problems.append(str(error))
        if any(server.url == url_of(host, port) for server in running_servers()):
            self._notes.append(
                f"a server of this account runs at {host}:{port}; the memory that it holds does not count as free"
            )

    def _look_at_the_roots(self) -> None:
        for root in self._config.models.roots:
            try:
                references.check_roots([Path(root)])
            except ConfigError as error:
                self._problems.append(str(error))

    def _placed(self, there: list[Gpu]) -> list[list[Device]]:
        gpu_build = build.gpu_backend() is not None
        if there and not gpu_build:
            self._notes.append(
                "there are GPUs, but llama.cpp was built for the CPU only; rebuild it with: make BACKEND=cuda setup "
                "(for cards before the RTX 20 series: BACKEND=vulkan)"
            )

        def assign(pools: Sequence[PoolConfig]) -> list[list[Device]]:
            usable, crowded = cores.usable_cores(), cores.crowded_cpus()
            return devices.assign(pools, there, gpu_build=gpu_build, cores=usable, cpus=crowded)[0]

        pools = self._config.pools
        try:
            return assign(pools)
        except ConfigError as error:
            together = str(error)
        placed: list[list[Device]] = []
        for pool in pools:  # one by one, to learn what is wrong with each
            try:
                placed += assign([pool])
            except ConfigError as error:
                self._problems.append(str(error))
                placed.append([])
        if all(placed):
            self._problems.append(together)
        return placed

    def _pool(self, pool: PoolConfig, placed: list[Device]) -> PoolFindings:
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
        prompt_cache = pool.prompt_cache_mib << 20 if placed else 0
        if footprint is not None:
            needs = memory.needs(footprint, Counter(map(memory.memory_of, placed)), prompt_cache=prompt_cache)
            for name, wanted in needs.items():
                self._needs[name][pool.id] = wanted
        return PoolFindings(
            id=pool.id,
            model_id=None if path is None else references.model_id(path),
            path=None if path is None else str(path),
            devices=tuple(device.name for device in placed),
            slots=pool.slots,
            ctx=pool.ctx,
            weights_bytes=None if footprint is None else footprint.weights,
            cache_bytes=None if footprint is None else footprint.cache,
            buffers_bytes=None if footprint is None else footprint.buffers,
            prompt_cache_bytes=prompt_cache,
        )

    def _model_file(self, pool: PoolConfig) -> Path:
        config = self._config
        roots = [Path(root) for root in config.models.roots]
        base = working_folder() if config.source is None else config.source.parent
        return references.resolve_owned(pool.model, base=base, roots=roots)

    def _memory(self, name: str, needs: Mapping[str, int]) -> MemoryFindings:
        need, free = sum(needs.values()), memory.free_bytes(name)
        fits = free is None or need <= free
        if not fits:
            assert free is not None
            self._problems.append(
                f"{name} has {gib(free)} free, but {_pools(needs)} {gib(need)}; {memory.remedy(name)}"
            )
        return MemoryFindings(place=name, pools=tuple(needs), need_bytes=need, free_bytes=free, fits=fits)


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
