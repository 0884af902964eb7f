"""What the routes call: submit, follow, reload, health. It knows tasks and pools, and neither HTTP nor threads.

Event loop thread only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from engines.api import FinishReason
from orchd.background import Background
from orchd.errors import (
    UNREADY_RETRY_S,
    InvalidParams,
    NotFound,
    PoolUnready,
    ReloadFailed,
    ReloadInProgress,
    TaskError,
)
from orchd.models import references
from orchd.models.registry import Registry
from orchd.open_tasks import OpenTasks
from orchd.pools import admission
from orchd.pools.pool import Pool, PoolState
from orchd.pools.reload import Reload
from orchd.queue.scheduler import Found
from orchd.queue.tasks import Task
from orchd.schemas import Accepted, Health, Reloaded, TaskRequest
from orchd.settings.config import TasksConfig
from orchd.supervisor import Supervisor

ANSWER_S = 2.0
"""How long a worker may take to end what was cancelled, when the server stops; steps are shorter (`orchd.server`)."""

_log = logging.getLogger(__name__)


class Service:
    """Everything that the five routes can ask for.

    Args:
        pools: By id, in the order of the configuration.
        tasks: How long tasks are kept.
        roots: Folders whose models a reload may ask for.
        grace_s: How long running tasks may go on where a reload needs their model's memory.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        pools: Mapping[str, Pool],
        tasks: TasksConfig,
        *,
        roots: Sequence[Path] = (),
        grace_s: float = 30.0,
        clock: Callable[[], float],
    ) -> None:
        self.pools = dict(pools)
        self._roots = tuple(roots)
        self._grace_s = grace_s
        self.models = Registry()
        self.rejected: Counter[str] = Counter()
        """Refused submits by the error's code, for metrics."""
        self.closing = False
        self._clock = clock
        self._tasks = OpenTasks(tasks, clock)
        self._background = Background()
        self._supervisor = Supervisor(self.pools, self._tasks, self._background)
        self.post = self._supervisor.post
        """Takes a worker's reports; any thread."""

    # --- submit ----------------------------------------------------------------------------------------------------

    def _check_closing(self) -> None:
        """Raise `PoolUnready` once the server shuts down."""
        if self.closing:
            raise PoolUnready("the server is shutting down; try again later", retry_after_s=UNREADY_RETRY_S)

    async def submit(self, request: TaskRequest) -> Accepted:
        """Accept a task. The same ``task_id`` with the same request again gets the first answer again.

        Raises:
            InvalidParams: The request is wrong; it has taken no place.
            AdmissionReject: The pool's queue is full.
            PoolUnready: The pool is loading, or the server is shutting down.
            PoolUnavailable: No replica is alive, or no pool serves ``model_ref``.
        """
        task_id = None if request.task_id is None else str(request.task_id)
        if task_id is not None and (known := self._tasks.store.get(task_id)) is not None:
            return self._answer_again(known, request)
        self._check_closing()
        admission.check_input(request)
        pool = admission.choose_pool(self.pools, request)
        with pool.scheduler.reservation(request.priority, task_id):
            task = await admission.prepare(pool, request)
            self._check_closing()
            admission.check_open(pool)
            if (known := self._tasks.store.get(task.id)) is not None:  # sent twice at the same time
                return self._answer_again(known, request)
            self._tasks.add(task)
            prompt_tokens = len(task.tokens)  # it forgets them once a worker has taken it
            accepted = pool.scheduler.submit(task)
            self._tasks.log.accepted(task, prompt_tokens)
            return accepted

    def _answer_again(self, task: Task, request: TaskRequest) -> Accepted:
        if task.digest != request.digest():
            raise InvalidParams(
                f"task_id: {task.id} was already used for a different request; use a new one, or omit it"
            )
        assert task.accepted is not None  # set when it was submitted
        self._tasks.log.repeated(task)
        return task.accepted

    def note_refusal(self, error: TaskError, request: TaskRequest | None = None) -> None:
        """Count a refused submit, of which no request is known if its body could not be read."""
        self.rejected[error.code.value] += 1
        self._tasks.log.refused(request, error)

    # --- follow ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def follow(self, task_id: str, *, grace_s: float | None = None) -> Iterator[Task]:
        """Listen to a task for the duration of the context.

        Args:
            task_id: The task.
            grace_s: How long it may go on if this listener is the last to leave; at most what is configured.

        Raises:
            NotFound: There is no such task, or its events are no longer kept.
        """
        task = self._tasks.store.get(task_id)
        if task is None:
            raise NotFound(f"there is no task {task_id}; it never existed, or its events are no longer kept")
        self._tasks.store.join(task)
        try:
            yield task
        finally:
            if self._tasks.store.leave(task, grace_s=grace_s):
                self.cancel(task)

    def sweep(self) -> None:
        """Forget old tasks, cancel abandoned ones, notice hanging workers; to be called a few times a second."""
        for task in self._tasks.store.sweep():
            self.cancel(task)
        self._supervisor.check()

    def cancel(self, task: Task) -> None:
        """End a task as cancelled, wherever it is. Nothing happens if it has ended."""
        pool = self.pools[task.pool_id]
        found = pool.scheduler.cancel(task)
        if found is Found.WAITING:
            self._tasks.end(task, FinishReason.CANCELLED)
        elif found is Found.RUNNING:
            for replica in pool.replicas:
                replica.worker.cancel(task)

    # --- reload ----------------------------------------------------------------------------------------------------

    async def reload(self, pool_id: str, model_ref: str | None) -> Reloaded:
        """Replace a pool's model, or load the same file again; goes on if the caller is cancelled.

        Raises:
            NotFound: There is no such pool.
            InvalidParams: ``model_ref`` names no readable file inside the roots.
            PoolUnready: The pool has no model yet, or the server is shutting down, or did so before it was done.
            ReloadInProgress: The pool is being reloaded.
            ReloadFailed: The old model serves as before.
        """
        pool = self.pools.get(pool_id)
        if pool is None:
            raise NotFound(f"there is no pool {pool_id!r}; available: {', '.join(self.pools)}")
        if self.closing or pool.state is PoolState.LOADING:
            why = "shutting down" if self.closing else "still loading its first model"
            raise PoolUnready(f"pool {pool.id} is {why}; try again", retry_after_s=UNREADY_RETRY_S)
        if pool.reloading:
            raise ReloadInProgress(f"pool {pool.id} is already being reloaded; try again when that has finished")
        path = pool.path if model_ref is None else references.resolve(model_ref, self._roots)
        pool.reloading = True
        work = self._background.run(self._reload(pool, path))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            if not work.cancelled():
                work.add_done_callback(_note_unheard)
                raise
            raise PoolUnready(
                f"the server is shutting down and has abandoned the reload of pool {pool.id}",
                retry_after_s=UNREADY_RETRY_S,
            ) from None

    async def _reload(self, pool: Pool, path: Path) -> Reloaded:
        def lost(replicas: Sequence[int]) -> None:
            self._supervisor.replicas_lost(pool, *replicas)

        def refuse(task: Task, error: TaskError) -> None:
            self._tasks.end(task, FinishReason.ERROR, error=error)

        try:
            began = self._clock()
            old = await Reload(pool, path, refuse=refuse, lost=lost, grace_s=self._grace_s).run()
        except ReloadFailed as error:
            _log.warning("pool %s: the reload failed: %s", pool.id, error)
            raise
        finally:
            pool.reloading = False
        assert pool.model is not None
        self.models.activate(pool.model.id)
        if old is not None:
            self.models.retire(old.id)
        was = "no model" if old is None else old.id
        took_s = self._clock() - began
        _log.info("pool %s now serves %s (before: %s); reloaded in %.2f s", pool.id, pool.model.id, was, took_s)
        return Reloaded(pool_id=pool.id, model_id=pool.model.id)

    # --- health and shutdown ---------------------------------------------------------------------------------------

    def health(self) -> Health:
        """A snapshot, made without asking any worker. Once the server stops, no pool can start tasks."""
        pools = tuple(pool.health(closing=self.closing) for pool in self.pools.values())
        if not self.closing and any(
            pool.state in (PoolState.LOADING, PoolState.SWAPPED_OUT) for pool in self.pools.values()
        ):
            status: Literal["ok", "loading", "degraded"] = "loading"
        elif all(pool.ready and all(replica.alive for replica in pool.replicas) for pool in pools):
            status = "ok"
        else:
            status = "degraded"
        return Health(status=status, pools=pools)

    @property
    def running(self) -> int:
        """Tasks that a worker has taken and not ended."""
        return self._tasks.running

    async def shut_down(self, grace_s: float) -> None:
        """Admit nothing, end what waits, let what runs finish within the grace, then end the rest as cancelled.

        When it returns every accepted task has its end, from this thread where its worker hangs.
        """
        self.closing = True
        for pool in self.pools.values():
            for task in pool.scheduler.clear():
                self._tasks.end(task, FinishReason.CANCELLED)
        await self._tasks.wait(grace_s)
        for task in self._tasks:
            self.cancel(task)
        self._background.cancel()
        await self._tasks.wait(ANSWER_S)
        for task in self._tasks:  # whatever their workers say of them later counts for nothing
            self._tasks.end(task, FinishReason.CANCELLED)
        await self._background.wait(ANSWER_S)

    def end_threads(self) -> None:
        """Let the threads for prompts and schemas end; whatever hangs in one is not waited for."""
        for model in filter(None, (pool.model for pool in self.pools.values())):
            model.end_threads()


def _note_unheard(work: asyncio.Task[Any]) -> None:
    """A reload whose caller has left is over. What it raises on purpose has been logged already."""
    if not work.cancelled() and (error := work.exception()) is not None and not isinstance(error, TaskError):
        _log.error("a reload failed after its client had disconnected", exc_info=error)
