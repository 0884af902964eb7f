"""Replacing a pool's model while it serves: all of its replicas, or none.

Where memory allows both models, the new one is loaded beside the old; tasks that run end on the old one, in the same
rounds in which new ones start on the new. Where it does not, the pool stops handing out tasks, lets those that run end,
frees the old model, loads the new one, and loads the old one again if that fails. Either way waiting tasks stay where
they are, and the queue goes on accepting.
"""

from __future__ import annotations

import array
import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from engines.api import Footprint
from engines.errors import LoadFailed, OutOfDeviceMemory
from orchd.active import ActiveModel
from orchd.errors import DecodeTimeout, ReloadFailed, TaskError
from orchd.scheduler import Place
from orchd.tasks import Task
from orchd.worker import Host

if TYPE_CHECKING:
    from orchd.pools import Pool

_log = logging.getLogger(__name__)

FREED_WAIT_S = 10.0
"""How long freed memory may take to show as free."""


class Reload:
    """One attempt. Event loop thread only.

    Args:
        pool: Gets the model.
        path: The model's file.
        refuse: Ends a waiting task that the new model cannot run.
        lost: Called if the old model had to leave and neither the new one nor it can be loaded.
        grace_s: How long running tasks may go on where the old model has to leave first.
    """

    def __init__(
        self,
        pool: Pool,
        path: Path,
        *,
        refuse: Callable[[Task, TaskError], None],
        lost: Callable[[], None],
        grace_s: float,
    ) -> None:
        self._pool = pool
        self._path = path
        self._refuse = refuse
        self._lost = lost
        self._grace_s = grace_s

    async def run(self) -> ActiveModel:
        """Replace the model; returns the one that was.

        Raises:
            ReloadFailed: The old model serves as before; the message says which step failed and why.
        """
        pool, old = self._pool, self._pool.model
        assert old is not None  # a pool is not reloaded before it is loaded
        try:
            footprint = await pool.vet(self._path)
            new = await pool.open(self._path)
        except LoadFailed as error:
            raise ReloadFailed(f"vetting failed: {error}; {old.id} still serves") from None
        try:
            if pool.config.reload == "auto" and self._fits(footprint):
                await self._beside(new)
            else:
                await self._instead(old, new, footprint)
        except BaseException:
            new.vocab.close()
            raise
        old.vocab.close()
        return old

    def _fits(self, footprint: Footprint) -> bool:
        try:
            self._pool.check_fit(self._path, footprint)
        except OutOfDeviceMemory:
            return False
        return True

    async def _beside(self, new: ActiveModel) -> None:
        try:
            hosts = await self._pool.load_hosts(new.path)
        except LoadFailed as error:
            assert self._pool.model is not None
            raise ReloadFailed(f"loading failed: {error}; {self._pool.model.id} still serves") from None
        await self._switch(new, hosts)

    async def _instead(self, old: ActiveModel, new: ActiveModel, footprint: Footprint) -> None:
        pool = self._pool
        _log.info("pool %s: no room for two models, %s leaves first", pool.id, old.id)
        late = DecodeTimeout("the task was not done when its pool had to make room for another model; send it again")
        await pool.take_down(self._grace_s, late)
        try:
            await self._await_room(footprint)
            hosts = await pool.load_hosts(new.path)
        except LoadFailed as error:
            await self._roll_back(old)
            raise ReloadFailed(f"loading failed: {error}; {old.id} was loaded again and serves") from None
        await self._switch(new, hosts)

    async def _await_room(self, footprint: Footprint) -> None:
        """Wait for freed memory to show; raises `OutOfDeviceMemory` if it is too little even then."""
        pool = self._pool
        for attempt in range(10):
            try:
                pool.check_fit(self._path, footprint)
            except OutOfDeviceMemory:
                if attempt == 9:
                    raise
                await pool.sleep(FREED_WAIT_S / 10)
            else:
                return

    async def _roll_back(self, old: ActiveModel) -> None:
        pool = self._pool
        try:
            await self._switch(old, await pool.load_hosts(old.path))
        except LoadFailed as error:
            _log.error("pool %s: %s cannot be loaded again either: %s", pool.id, old.id, error)
            self._lost()

    async def _switch(self, new: ActiveModel, hosts: list[Host]) -> None:
        """Re-tokenise what waits, then hand over everything at once."""
        pool = self._pool
        tokens: dict[str, array.array[int] | TaskError] = {}
        if new is not pool.model:
            while len(waiting := [task for task in pool.scheduler.waiting() if task.id not in tokens]) > _FEW:
                tokens |= await asyncio.to_thread(_tokenize, new, waiting, pool.config.ctx)
            tokens |= _tokenize(new, waiting, pool.config.ctx)  # from here to the switch nothing can come in
        for task in pool.scheduler.waiting():
            if isinstance(outcome := tokens.get(task.id), TaskError) and pool.scheduler.cancel(task) is Place.WAITING:
                self._refuse(task, outcome)
        pool.switch(new, hosts, {key: value for key, value in tokens.items() if not isinstance(value, TaskError)})


_FEW = 8  # so many prompts are tokenised on the event loop


def _tokenize(model: ActiveModel, tasks: list[Task], ctx: int) -> dict[str, array.array[int] | TaskError]:
    """Every task's prompt in the model's tokens, or why it cannot run on that model."""
    outcome: dict[str, array.array[int] | TaskError] = {}
    for task in tasks:
        try:
            model.check_ref(task.request)
            outcome[task.id] = model.tokenize(task.request, ctx=ctx)
        except TaskError as error:
            outcome[task.id] = error
    return outcome
