"""The names that requests may use for a model, as the server's health tells them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from orchd.client import Client, ClientError, PoolHealth
from orchd.errors import NotFound
from orchd.openai.errors import FromServer

FRESH_S: Final = 2.0
"""For so long nobody asks the server again. A reload that comes meanwhile is found out by the server, not here."""


@dataclass(frozen=True)
class Target:
    """What a model's name stands for.

    Attributes:
        model: The model's id, or its name while it is not loaded.
        ctx: Tokens that prompt and output together may have.
        pool_id: The pool, where the name was a pool's.
        model_ref: The model, where the name was a model's.
    """

    model: str
    ctx: int
    pool_id: str | None = None
    model_ref: str | None = None


class Models:
    """The server's pools and their models.

    Args:
        client: Asks the server.
        clock: Monotonic, in seconds.
    """

    def __init__(self, client: Client, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._client = client
        self._clock = clock
        self._pools: tuple[PoolHealth, ...] = ()
        self._asked_s = float("-inf")
        self._asking = asyncio.Lock()

    async def names(self) -> list[str]:
        """Every name: models first, then pools, each once. Raises `FromServer`."""
        return _names(await self._fresh(0.0))

    async def find(self, name: str) -> Target:
        """What a name stands for; a pool's name wins over a model's.

        Raises:
            NotFound: No pool and no model has this name.
            FromServer: The server cannot be asked.
        """
        target = _find(name, await self._fresh(FRESH_S)) or _find(name, await self._fresh(0.0))
        if target is None:
            available = ", ".join(_names(self._pools))
            raise NotFound(f"model: there is no model {name!r}; available: {available}")
        return target

    async def _fresh(self, at_most_s: float) -> tuple[PoolHealth, ...]:
        wanted_s = self._clock() - at_most_s
        if self._asked_s < wanted_s:
            async with self._asking:
                if self._asked_s < wanted_s:  # nobody has asked while this waited
                    asked_s = self._clock()
                    try:
                        self._pools = (await self._client.health()).pools
                    except ClientError as error:
                        raise FromServer(error) from error
                    self._asked_s = asked_s
        return self._pools


def _names(pools: tuple[PoolHealth, ...]) -> list[str]:
    models = [pool.model_id for pool in pools if pool.model_id is not None]
    return list(dict.fromkeys([*models, *(pool.id for pool in pools)]))


def _find(name: str, pools: tuple[PoolHealth, ...]) -> Target | None:
    for pool in pools:
        if pool.id == name:
            return Target(pool.model_id or name, pool.ctx, pool_id=name)
    shapes = [pool.ctx for pool in pools if pool.model_id == name]
    return Target(name, min(shapes), model_ref=name) if shapes else None
