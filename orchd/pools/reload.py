"""Replacing a pool's model while it serves: all of its replicas, or none.

Where memory allows both models, the new one is loaded beside the old; tasks that run end on the old one, in the same
rounds in which new ones start on the new. Where it does not, the pool stops handing out tasks, lets those that run end,
frees the old model, loads the new one, and loads the old one again if that fails. Either way waiting tasks stay where
they are, and the queue goes on accepting.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from engines.api import Prompt
from engines.errors import LoadFailed, OutOfDeviceMemory
from orchd.errors import DecodeTimeout, ReloadFailed, TaskError
from orchd.models.active_model import ActiveModel, is_short
from orchd.pools.pool import Pool, PoolState, one_sentence
from orchd.pools.replica import Instance
from orchd.queue.scheduler import Found
from orchd.queue.tasks import Task
from orchd.schemas import TaskRequest

_log = logging.getLogger(__name__)

FREED_WAIT_S = 10.0
"""How long freed memory may take to show as free."""

Prompts = dict[str, Prompt | TaskError]
"""By task id: its prompt as the new model reads it, or why it cannot run on that model."""


class Reload:
    """One attempt. Event loop thread only.

    Args:
        pool: Gets the model.
        path: The model's file.
        refuse: Ends a waiting task that the new model cannot run.
        lost: Is told the replicas that were left without a model, because the old one could not be put back there.
        grace_s: How long running tasks may go on where the old model has to leave first.
    """

    def __init__(
        self,
        pool: Pool,
        path: Path,
        *,
        refuse: Callable[[Task, TaskError], None],
        lost: Callable[[Sequence[int]], None],
        grace_s: float,
    ) -> None:
        self._pool = pool
        self._path = path
        self._refuse = refuse
        self._lost = lost
        self._grace_s = grace_s

    async def run(self) -> ActiveModel | None:
        """Replace the model; returns the one that was, None if the pool had none since the start.

        Raises:
            ReloadFailed: The old model serves as before; the message says which step failed and why.
        """
        pool, old = self._pool, self._pool.model
        try:
            new = await pool.loader.open(self._path)
        except LoadFailed as error:
            raise self._failed("vetting", error, _unchanged(old)) from None
        try:
            async with pool.loader.turn:
                if old is None:
                    await self._first(new)
                elif pool.config.reload == "auto" and await self._fits_beside(new):
                    await self._beside(old, new)
                else:
                    await self._instead(old, new)
        except BaseException:
            pool.loader.discard(new)
            raise
        if old is not None:
            pool.loader.discard(old)
        return old

    def _failed(self, step: str, error: LoadFailed, now: str) -> ReloadFailed:
        """One sentence without folders: llama.cpp quotes the path it was given."""
        why = one_sentence(error, self._path)
        if self._pool.state is PoolState.FAILED:
            self._pool.failure = why
        return ReloadFailed(f"{step} failed: {why}; {now}")

    async def _first(self, new: ActiveModel) -> None:
        try:
            await self._pool.check_fit(new)
            await self._switch(new, await self._pool.loader.load_instances(new))
        except LoadFailed as error:
            raise self._failed("loading", error, _unchanged(None)) from None

    async def _fits_beside(self, new: ActiveModel) -> bool:
        try:
            await self._pool.check_fit(new)
        except OutOfDeviceMemory as error:
            _log.info("pool %s: no room for two models: %s", self._pool.id, error)
            return False
        return True

    async def _beside(self, old: ActiveModel, new: ActiveModel) -> None:
        try:
            await self._switch(new, await self._pool.loader.load_instances(new))
        except LoadFailed as error:
            raise self._failed("loading", error, _unchanged(old)) from None

    async def _instead(self, old: ActiveModel, new: ActiveModel) -> None:
        pool = self._pool
        try:
            await pool.check_fit(new, leaving=old)
        except OutOfDeviceMemory as error:
            raise self._failed("loading", error, _unchanged(old)) from None
        _log.info("pool %s: unloading %s before loading %s", pool.id, old.id, new.id)
        late = DecodeTimeout("the task had not finished when its pool had to unload the model; submit it again")
        stuck = await pool.take_down(self._grace_s, late)
        try:
            if stuck:
                raise LoadFailed(f"{old.id} could not be unloaded, because a worker hangs in a step")
            await self._await_room(new)
            await self._switch(new, await pool.loader.load_instances(new))
        except Exception as error:
            now = await self._roll_back(old, stuck)
            if isinstance(error, LoadFailed):
                raise self._failed("loading", error, now) from None
            raise

    async def _await_room(self, new: ActiveModel) -> None:
        """Wait for freed memory to show; raises `OutOfDeviceMemory` if it is too little even then."""
        pool = self._pool
        for attempt in range(10):
            try:
                await pool.check_fit(new)
            except OutOfDeviceMemory:
                if attempt == 9:
                    raise
                await pool.sleep(FREED_WAIT_S / 10)
            else:
                return

    async def _roll_back(self, old: ActiveModel, stuck: Sequence[int]) -> str:
        """Load the old model again, but for replicas whose worker hangs; returns how things stand now."""
        pool = self._pool
        lost, now = stuck, f"{old.id} was loaded again and serves"
        try:
            instances = await pool.loader.load_instances(old, without=stuck)
        except Exception as error:
            _log.error("pool %s: %s cannot be loaded again either: %s", pool.id, old.id, error)
            instances = [None] * len(pool.replicas)
            lost, now = range(len(instances)), f"{old.id} could not be loaded again either; retrying"
        pool.switch(old, instances, {})
        if lost:
            self._lost(lost)
        return now

    async def _switch(self, new: ActiveModel, instances: Sequence[Instance | None]) -> None:
        """Re-tokenise what waits, then hand over everything at once."""
        pool = self._pool
        try:
            prompts = await self._tokenize_waiting(new)
            for task in pool.scheduler.waiting():
                outcome = prompts.get(task.id)
                if isinstance(outcome, TaskError) and pool.scheduler.cancel(task) is Found.WAITING:
                    self._refuse(task, outcome)
        except BaseException:
            pool.loader.discard_instances(instances)
            raise
        else:
            ready = {key: value for key, value in prompts.items() if not isinstance(value, TaskError)}
            pool.switch(new, instances, ready)
        finally:
            pool.takes_tasks.set()

    async def _tokenize_waiting(self, new: ActiveModel) -> Prompts:
        """Every waiting task's prompt: long ones on a thread; the loop has not run any further when this returns.

        Rounds are as long as what came in during the last one. Where tasks come faster than the new model's template
        renders them, the last round lets none in, because not even one conversation may be rendered on the loop.
        """
        prompts: Prompts = {}
        loop, ctx = asyncio.get_running_loop(), self._pool.config.ctx
        for left in reversed(range(_MAX_ROUNDS)):
            if not left:
                self._pool.takes_tasks.clear()
            waiting = self._untokenized(prompts)
            if is_short(*waiting.values()):
                break
            prompts |= await loop.run_in_executor(new.long_prompts, _tokenize, new, waiting, ctx)
        return prompts | _tokenize(new, self._untokenized(prompts), ctx)

    def _untokenized(self, prompts: Prompts) -> dict[str, TaskRequest]:
        """By task id. A task that starts meanwhile forgets its prompt, so this holds requests."""
        return {task.id: task.request for task in self._pool.scheduler.waiting() if task.id not in prompts}


def _unchanged(old: ActiveModel | None) -> str:
    return "the pool still has no model" if old is None else f"{old.id} still serves"


_MAX_ROUNDS = 8  # each but the last leaves only what came in meanwhile


def _tokenize(model: ActiveModel, requests: Mapping[str, TaskRequest], ctx: int) -> Prompts:
    outcome: Prompts = {}
    for task_id, request in requests.items():
        try:
            model.check_ref(request)
            outcome[task_id] = model.tokenize(request, ctx=ctx)
        except TaskError as error:
            outcome[task_id] = error
    return outcome
