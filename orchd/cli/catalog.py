"""The models that a reload may ask for: their names, their sizes, and whether they fit."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec

from engines.errors import LoadFailed
from engines.gguf_files import SUFFIX, parts, split_of
from engines.llamacpp import build
from engines.llamacpp.vet import vet
from orchd.errors import ConfigError, InvalidParams
from orchd.machine import cores, devices, gpus, memory
from orchd.models import files, references
from orchd.pools.loading import model_spec
from orchd.settings.config import Config, PoolConfig
from orchd.settings.sources import working_folder

MOST_MODELS: Final = 1000


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A model; what could not be found out is None, and `problem` says why."""

    name: str
    path: str
    size_bytes: int | None = None
    need_bytes: int | None = None
    fits: bool | None = None
    problem: str | None = None


class Catalog:
    """Looks at the model files of a configuration, for one of its pools.

    Args:
        config: The whole configuration.
        pool: Its slots, context and devices say what a model needs, and where.

    Raises:
        ConfigError: A root cannot be read, or the pool's devices cannot be used.
    """

    def __init__(self, config: Config, pool: PoolConfig) -> None:
        roots = [Path(root) for root in config.models.roots]
        references.check_roots(roots)
        base = working_folder() if config.source is None else config.source.parent
        owned = [references.resolve_owned(one.model, base=base, roots=roots) for one in config.pools]
        self.roots = list(dict.fromkeys([*roots, *(root for path in owned for root in references.roots_of(path))]))
        self._pool = pool
        there = gpus.visible(gpus.find_gpus(), os.environ)
        gpu_build = build.gpu_backend() is not None
        placed = devices.assign([pool], there, gpu_build=gpu_build, cores=cores.usable_cores())[0][0]
        self._replicas = Counter(map(memory.memory_of, placed))

    def names(self) -> list[str]:
        """Every model's shortest name, as a reload takes it."""
        return list(dict.fromkeys(itertools.islice(_names(self.roots), MOST_MODELS)))

    def look_at(self, name: str) -> Entry:
        """What one of them is; takes about a second."""
        try:
            path = references.resolve(name, self.roots)
        except InvalidParams as error:
            return Entry(name=name, path="", problem=str(error))
        try:
            size = sum(part.stat().st_size for part in parts(path))
            files.looks_like_gguf(path)
            footprint = vet(model_spec(self._pool, path))
        except (LoadFailed, OSError) as error:
            return Entry(name=name, path=str(path), problem=str(error))
        needs = memory.needs(footprint, self._replicas, prompt_cache=self._pool.prompt_cache_mib << 20)
        free = {place: memory.free_bytes(place) for place in needs}
        fits = all((there := free[place]) is None or need <= there for place, need in needs.items())
        return Entry(name=name, path=str(path), size_bytes=size, need_bytes=sum(needs.values()), fits=fits)


def pool_of(config: Config, pool_id: str | None) -> PoolConfig:
    """The pool of that name, or the first. Raises `ConfigError`."""
    for pool in config.pools:
        if pool_id in (None, pool.id):
            return pool
    raise ConfigError(f"--pool: there is no pool {pool_id!r}; available: {', '.join(one.id for one in config.pools)}")


def _names(roots: Sequence[Path]) -> Iterator[str]:
    for root in roots:
        for folder, folders, found in os.walk(root):
            folders.sort()
            for file in sorted(found):
                split = split_of(file)
                if file.endswith(SUFFIX) and (split is None or split[1] == 1):
                    yield str((Path(folder) / references.model_id(Path(file))).relative_to(root))
