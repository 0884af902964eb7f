"""From a file to the handles of a pool's replicas: looked at from outside, vetted, measured, loaded on each device."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path

from engines.api import ModelSpec, Vocab
from engines.errors import LoadFailed
from orchd.machine import memory
from orchd.machine.devices import Device
from orchd.models import files, references
from orchd.models.active_model import ActiveModel, VettedModel
from orchd.models.loader import Loader
from orchd.models.vetted import Vetted
from orchd.pools.replica import Instance
from orchd.settings.config import PoolConfig

_log = logging.getLogger(__name__)

DIGEST_LOG_S = 5.0
"""How often a long computation of a checksum is logged."""


class PoolLoader:
    """What one pool loads, on its devices and with its settings. Event loop thread only.

    Args:
        config: The pool's settings.
        devices: One replica on each.
        loader: Does the loading, for all pools.
        step_target_s: See `engines.api.ModelSpec`.
        lone_step_s: See `engines.api.ModelSpec`.
        vetted: Remembers files between two starts; None remembers none.
    """

    def __init__(
        self,
        config: PoolConfig,
        devices: Sequence[Device],
        loader: Loader,
        *,
        step_target_s: float,
        lone_step_s: float = ModelSpec.lone_step_s,
        vetted: Vetted | None = None,
    ) -> None:
        self.turn = loader.turn
        """To be held from `check_fit` until the model is loaded."""
        self._config = config
        self._devices = devices
        self._loader = loader
        self._step_target_s = step_target_s
        self._lone_step_s = lone_step_s
        self._vetted = vetted

    async def vet(self, path: Path) -> VettedModel:
        """Look at a file from outside, then where it can do no harm. Raises `LoadFailed` if it cannot be served."""
        fingerprint = await self._look(path)
        digest, footprint = await asyncio.gather(
            self._check_digest(path), self._loader.vet(self._spec(path)), return_exceptions=True
        )
        if isinstance(digest, BaseException):
            raise digest  # what is damaged is called so, whatever vetting makes of it
        if isinstance(footprint, BaseException):
            raise footprint
        if files.fingerprint(path) != fingerprint:
            raise LoadFailed(f"{path.name} changed while it was being vetted; reload it once it is complete")
        return VettedModel(references.model_id(path), path, footprint, fingerprint)

    async def load_first(
        self, path: Path, check_fit: Callable[[VettedModel], Awaitable[None]]
    ) -> tuple[ActiveModel, list[Instance | None]]:
        """As `vet` and `open_and_load`, while nothing is served yet: then a verdict of an earlier start will do.

        Its checksum is computed beside the load: a file that has not changed since it served is no danger.

        Args:
            path: The model's file.
            check_fit: Raises `engines.errors.OutOfDeviceMemory` if there is no room for it. The turn is held.
        """
        fingerprint = await self._look(path)  # before the verdict is looked up: it must be on this very file
        if self._vetted is None or (footprint := self._vetted.take(self._spec(path))) is None:
            vetted, digest = await self.vet(path), None
        else:
            vetted = VettedModel(references.model_id(path), path, footprint, fingerprint)
            digest = self._check_digest(path)
            digest.add_done_callback(lambda done: done.cancelled() or done.exception())  # waited for, if at all, below
        async with self.turn:
            await check_fit(vetted)
            try:
                model, instances = await self.open_and_load(vetted)
            except LoadFailed:
                if digest is not None:
                    await digest
                raise
        try:
            if digest is not None:
                await digest
        except BaseException:
            self.discard(model)
            self.discard_instances(instances)
            raise
        return model, instances

    async def _look(self, path: Path) -> tuple[tuple[int, ...], ...]:
        """The fingerprint of a file that looks like a model from outside."""
        fingerprint = files.fingerprint(path)
        await self._loader.run(lambda: files.looks_like_gguf(path))
        return fingerprint

    def _check_digest(self, path: Path) -> asyncio.Future[None]:
        return self._loader.beside(lambda: files.check_digest(path, on_progress=self._digest_progress(path)))

    async def open(self, path: Path) -> ActiveModel:
        """Vet a file and open its tokenizer. Raises `LoadFailed`."""
        vetted = await self.vet(path)
        return _active(vetted, await self._loader.vocab(path))

    async def open_and_load(self, vetted: VettedModel) -> tuple[ActiveModel, list[Instance | None]]:
        """The tokenizer beside the weights, and a handle for every replica; or `LoadFailed` and neither."""
        opening = asyncio.ensure_future(self._loader.vocab(vetted.path, beside=True))
        try:
            instances = await self.load_instances(vetted)
        except BaseException:
            opening.add_done_callback(self._discard_opened)
            raise
        try:
            return _active(vetted, await opening), instances
        except BaseException:
            self.discard_instances(instances)
            raise

    def _discard_opened(self, opening: asyncio.Future[Vocab]) -> None:
        if not opening.cancelled() and opening.exception() is None:
            self._loader.discard(opening.result())

    async def check_fit(
        self, model: VettedModel, *, leaving: ActiveModel | None = None, leaving_saved: int = 0
    ) -> None:
        """Raise `OutOfDeviceMemory` unless every device has room for its replicas now, or without a model it has.

        Args:
            model: What is to be loaded.
            leaving: What will be gone before.
            leaving_saved: Bytes of host memory that go with it.
        """
        replicas = Counter(memory.memory_of(device) for device in self._devices)
        saved = self._config.prompt_cache_mib << 20
        needs = memory.needs(model.footprint, replicas, prompt_cache=saved)
        free = await self._loader.run(lambda: {name: memory.free_bytes(name) for name in needs})
        freed = {
            name: memory.taken(leaving.footprint, memory=name) * count
            for name, count in replicas.items()
            if leaving is not None
        }
        freed[memory.HOST] = freed.get(memory.HOST, 0) + leaving_saved
        memory.check_fit(model.path.name, needs, free, leaving=freed)

    async def load_instances(self, model: VettedModel, *, without: Collection[int] = ()) -> list[Instance | None]:
        """A handle for every replica but some, or `LoadFailed` and none."""
        instances: list[Instance | None] = []
        try:
            for index in range(len(self._devices)):
                instances.append(None if index in without else await self.load_instance(index, model))
        except BaseException:
            self.discard_instances(instances)
            raise
        return instances

    async def load_instance(self, index: int, model: VettedModel) -> Instance:
        """A handle for one replica, of the very files that were vetted. Raises `LoadFailed`."""
        device = self._devices[index]
        label = f"{self._config.id}/{index} {model.id} on {device.name}"
        model.check_unchanged()
        try:
            instance = Instance(await self._loader.model(self._spec(model.path), device.spec, label=label))
        except LoadFailed as error:
            if len(self._devices) == 1:
                raise
            raise type(error)(f"{error} (replica {index} on {device.name})") from None
        try:
            model.check_unchanged()
        except LoadFailed:
            self.discard_instances([instance])
            raise
        return instance

    def remember(self, model: ActiveModel) -> None:
        """The model serves: the next start may take the verdict on its file as given."""
        if self._vetted is not None:
            self._vetted.keep(self._spec(model.path), model.footprint)

    def discard(self, model: ActiveModel) -> None:
        """Close the tokenizer of a model that the pool does not serve."""
        self._loader.discard(model.vocab)

    def discard_instances(self, instances: Iterable[Instance | None]) -> None:
        """Close handles that no worker was given."""
        self._loader.discard(*(instance.model for instance in instances if instance is not None))

    def trim(self) -> None:
        """Give the system back what workers closed."""
        self._loader.trim()

    def _digest_progress(self, path: Path) -> Callable[[float], None]:
        """Logs how far it is where that takes long; called on another thread."""
        said_at = time.monotonic()

        def log(share: float) -> None:
            nonlocal said_at
            self._loader.check_open()
            if time.monotonic() - said_at >= DIGEST_LOG_S:
                said_at = time.monotonic()
                _log.info("pool %s: %d %% of %s checked against its checksum", self._config.id, 100 * share, path.name)

        return log

    def _spec(self, path: Path) -> ModelSpec:
        shape = model_spec(self._config, path)
        return replace(
            shape,
            prompt_cache_mib=self._config.prompt_cache_mib // len(self._devices),
            step_target_s=self._step_target_s,
            lone_step_s=self._lone_step_s,
        )


def _active(vetted: VettedModel, vocab: Vocab) -> ActiveModel:
    return ActiveModel(vetted.id, vetted.path, vetted.footprint, vetted.fingerprint, vocab)


def model_spec(config: PoolConfig, path: Path) -> ModelSpec:
    """A file in the shape that a pool's settings ask for: every setting that `ModelSpec` knows by the same name."""
    shape = {field.name: getattr(config, field.name) for field in fields(ModelSpec) if hasattr(config, field.name)}
    return ModelSpec(path, **shape)
