"""From a file to the handles of a pool's replicas: looked at from outside, vetted, measured, loaded on each device."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path

from engines.api import ModelSpec
from engines.errors import LoadFailed
from orchd.machine import memory
from orchd.machine.devices import Device
from orchd.models import files, references
from orchd.models.active_model import ActiveModel
from orchd.models.loader import Loader
from orchd.pools.replica import Instance
from orchd.settings.config import PoolConfig

_log = logging.getLogger(__name__)


class PoolLoader:
    """What one pool loads, on its devices and with its settings. Event loop thread only.

    Args:
        config: The pool's settings.
        devices: One replica on each.
        loader: Does the loading, for all pools.
        step_target_s: See `engines.api.ModelSpec`.
        lone_step_s: See `engines.api.ModelSpec`.
    """

    def __init__(
        self,
        config: PoolConfig,
        devices: Sequence[Device],
        loader: Loader,
        *,
        step_target_s: float,
        lone_step_s: float = ModelSpec.lone_step_s,
    ) -> None:
        self.turn = loader.turn
        """To be held from `check_fit` until the model is loaded."""
        self._config = config
        self._devices = devices
        self._loader = loader
        self._step_target_s = step_target_s
        self._lone_step_s = lone_step_s

    async def open(self, path: Path) -> ActiveModel:
        """Look at a file from outside, then where it can do no harm, then open its tokenizer. Raises `LoadFailed`."""
        fingerprint = files.fingerprint(path)
        await self._loader.run(lambda: files.looks_like_gguf(path))
        await self._loader.run(lambda: files.check_digest(path, on_progress=self._digest_progress(path)))
        footprint = await self._loader.vet(self._spec(path))
        if files.fingerprint(path) != fingerprint:
            raise LoadFailed(f"{path.name} changed while it was being vetted; reload it once it is complete")
        return ActiveModel(
            references.model_id(path),
            path,
            await self._loader.vocab(path),
            footprint=footprint,
            fingerprint=fingerprint,
        )

    async def check_fit(
        self, model: ActiveModel, *, leaving: ActiveModel | None = None, leaving_saved: int = 0
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

    async def load_instances(self, model: ActiveModel, *, without: Collection[int] = ()) -> list[Instance | None]:
        """A handle for every replica but some, or `LoadFailed` and none."""
        instances: list[Instance | None] = []
        try:
            for index in range(len(self._devices)):
                instances.append(None if index in without else await self.load_instance(index, model))
        except BaseException:
            self.discard_instances(instances)
            raise
        return instances

    async def load_instance(self, index: int, model: ActiveModel) -> Instance:
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
        """Logs every tenth of the way; called on the loading thread."""
        tenth = 0

        def log(share: float) -> None:
            nonlocal tenth
            self._loader.check_open()
            if int(share * 10) > tenth:
                tenth = int(share * 10)
                _log.info("pool %s: %d %% of %s checked against its checksum", self._config.id, 10 * tenth, path.name)

        return log

    def _spec(self, path: Path) -> ModelSpec:
        shape = model_spec(self._config, path)
        return replace(
            shape,
            prompt_cache_mib=self._config.prompt_cache_mib // len(self._devices),
            step_target_s=self._step_target_s,
            lone_step_s=self._lone_step_s,
        )


def model_spec(config: PoolConfig, path: Path) -> ModelSpec:
    """A file in the shape that a pool's settings ask for: every setting that `ModelSpec` knows by the same name."""
    shape = {field.name: getattr(config, field.name) for field in fields(ModelSpec) if hasattr(config, field.name)}
    return ModelSpec(path, **shape)
