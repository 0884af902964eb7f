"""What the routes call: submit, follow, reload, health. It knows tasks and pools, and neither HTTP nor threads.

Event loop thread only, but for `post`, which workers call.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import logging
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from engines.api import FinishReason
from engines.errors import EngineDead
from orchd import models
from orchd.active import ActiveModel
from orchd.config import TasksConfig
from orchd.errors import (
    AdmissionReject,
    InvalidParams,
    NotFound,
    PoolUnavailable,
    PoolUnready,
    ReloadFailed,
    ReloadInProgress,
    TaskError,
)
from orchd.pools import Pool
from orchd.reload import Reload
from orchd.scheduler import Place, Scheduler
from orchd.schemas import Accepted, Health, Reloaded, TaskRequest
from orchd.tasks import Task, TaskState, TaskStore
from orchd.worker import Begun, Ended, HostClosed, Progress, ReplicaDown, Report

T = TypeVar("T")
_log = logging.getLogger(__name__)

INLINE_CHARS = 2000
"""Prompts up to this length are tokenised on the event loop; longer ones on a thread, so that nobody's stream waits."""

UNREADY_RETRY_S = 2.0


class Service:
    """See the module.

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
        self.models = models.Registry()
        self.rejected: Counter[str] = Counter()
        """Refused submits by the error's code, for metrics."""
        self.closing = False
        self._tasks = TaskStore(
            retention_s=tasks.retention_s,
            retained_bytes=tasks.retained_bytes,
            cancel_grace_s=tasks.cancel_grace_s,
            clock=clock,
        )
        self._idle = asyncio.Event()
        self._idle.set()
        self._open = 0  # accepted tasks that have not ended
        self._loop = asyncio.get_running_loop()
        self._background: set[asyncio.Task[Any]] = set()

    # --- submit ----------------------------------------------------------------------------------------------------

    def check_room(self) -> None:
        """Raise what `submit` would raise for any request at all, before its body is even read.

        Raises:
            PoolUnready: Shutting down, or every pool is loading.
            AdmissionReject: Every pool's queue is full.
        """
        if self.closing:
            raise PoolUnready(
                "the server is shutting down; send it again once it is back", retry_after_s=UNREADY_RETRY_S
            )
        refusal: AdmissionReject | None = None
        for pool in self.pools.values():
            try:
                pool.scheduler.check_room()
            except AdmissionReject as error:
                refusal = error
            else:
                return
        if refusal is not None:
            raise refusal

    async def submit(self, request: TaskRequest) -> Accepted:
        """Accept a task. The same ``task_id`` with the same request again gets the first answer again.

        Raises:
            InvalidParams: The request is wrong; it has taken no place.
            AdmissionReject: The pool's queue is full.
            PoolUnready: The pool is loading, or the server is shutting down.
            PoolUnavailable: No replica is alive, or no pool serves ``model_ref``.
        """
        known = None if request.task_id is None else self._tasks.get(str(request.task_id))
        if known is not None:
            return self._answer_again(known, request)
        if (request.prompt is None) == (request.messages is None):
            raise InvalidParams("give exactly one of prompt and messages")
        pool = self._choose_pool(request)
        with self._place_in(pool) as scheduler:
            task = await self._prepare(pool, request)
            self._tasks.add(task)
            answer, seat = scheduler.submit(task)
        self._open += 1
        self._idle.clear()
        if seat is not None:
            pool.workers[seat].wake()
        return answer

    @contextlib.contextmanager
    def _place_in(self, pool: Pool) -> Iterator[Scheduler]:
        """A place in the pool's queue, given back if the task is refused after all."""
        pool.scheduler.reserve()
        try:
            yield pool.scheduler
        except BaseException:
            pool.scheduler.release_place()
            raise

    async def _prepare(self, pool: Pool, request: TaskRequest) -> Task:
        task_id = str(request.task_id or uuid.uuid4())
        while True:
            model = pool.model
            assert model is not None  # `_choose_pool` saw to it
            try:
                tokens = await self._tokenize(model, request, pool.config.ctx)
            except EngineDead:
                continue  # a reload closed it meanwhile
            if self._tasks.get(task_id) is not None:
                raise InvalidParams(f"task_id {task_id} was sent twice at the same time; send it once")
            if pool.model is model:  # else a reload changed the vocabulary meanwhile
                return Task(task_id, request, pool.id, tokens)

    async def _tokenize(self, model: ActiveModel, request: TaskRequest, ctx: int) -> array.array[int]:
        size = len(request.prompt or "") + sum(len(m.content) for m in request.messages or ())
        if size <= INLINE_CHARS:
            return model.tokenize(request, ctx=ctx)
        return await self._loop.run_in_executor(None, lambda: model.tokenize(request, ctx=ctx))

    def _answer_again(self, task: Task, request: TaskRequest) -> Accepted:
        if task.request != request:
            raise InvalidParams(f"task_id {task.id} was used for another request; use a new one, or leave it out")
        assert task.accepted is not None
        return task.accepted

    def _choose_pool(self, request: TaskRequest) -> Pool:
        pools = list(self.pools.values())
        if request.pool_id is not None:
            if request.pool_id not in self.pools:
                raise InvalidParams(f"there is no pool {request.pool_id!r}; there are: {', '.join(self.pools)}")
            pools = [self.pools[request.pool_id]]
        elif request.model_ref is None and len(pools) > 1:
            raise InvalidParams(f"say which pool_id: {', '.join(self.pools)}")
        if request.model_ref is not None:
            pools = [pool for pool in pools if pool.model is not None and pool.model.is_named(request.model_ref)]
            if not pools:
                raise PoolUnavailable(
                    f"no pool serves {request.model_ref!r} now; /health tells which models are served",
                    retry_after_s=UNREADY_RETRY_S,
                )
        pool = min(pools, key=lambda pool: (not pool.ready, sum(pool.scheduler.depth().values())))
        if self.closing or pool.loading:
            why = "shutting down" if self.closing else "still loading its model"
            raise PoolUnready(f"pool {pool.id} is {why}; try again", retry_after_s=UNREADY_RETRY_S)
        if not pool.scheduler.any_ready and not pool.away:
            raise PoolUnavailable(
                f"no replica of pool {pool.id} is alive; it is being brought back",
                retry_after_s=UNREADY_RETRY_S,
            )
        return pool

    def count_rejection(self, error: TaskError) -> None:
        """Note a refused submit."""
        self.rejected[error.code.value] += 1

    # --- follow ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def follow(self, task_id: str) -> Iterator[Task]:
        """Listen to a task for the duration of the context. Raises `NotFound`."""
        task = self._tasks.get(task_id)
        if task is None:
            raise NotFound(f"there is no task {task_id}; it never was, or its events are no longer kept")
        self._tasks.join(task)
        try:
            yield task
        finally:
            self._tasks.leave(task)

    def sweep(self) -> None:
        """Forget old tasks, cancel abandoned ones; to be called a few times a second."""
        for task in self._tasks.sweep():
            self.cancel(task)

    def cancel(self, task: Task) -> None:
        """End a task as cancelled, wherever it is. Nothing happens if it has ended."""
        pool = self.pools[task.pool_id]
        place = pool.scheduler.cancel(task)
        if place is Place.WAITING:
            self._end(task, FinishReason.CANCELLED)
        elif place is Place.RUNNING:
            for worker in pool.workers:
                worker.cancel(task)

    # --- reload ----------------------------------------------------------------------------------------------------

    async def reload(self, pool_id: str, model_ref: str | None) -> Reloaded:
        """Replace a pool's model, or load the same file again; goes on if the caller is cancelled.

        Raises:
            NotFound: There is no such pool.
            InvalidParams: ``model_ref`` names no readable file inside the roots.
            PoolUnready: The pool has no model yet, or the server is shutting down.
            ReloadInProgress: The pool is being reloaded.
            ReloadFailed: The old model serves as before.
        """
        pool = self.pools.get(pool_id)
        if pool is None:
            raise NotFound(f"there is no pool {pool_id!r}; there are: {', '.join(self.pools)}")
        if self.closing or pool.model is None:
            why = "shutting down" if self.closing else "still loading its first model"
            raise PoolUnready(f"pool {pool.id} is {why}; try again", retry_after_s=UNREADY_RETRY_S)
        if pool.reloading:
            raise ReloadInProgress(f"pool {pool.id} is being reloaded; try again when that is done")
        path = pool.model.path if model_ref is None else models.resolve(model_ref, self._roots)
        pool.reloading = True
        return await asyncio.shield(self._keep(self._reload(pool, path)))

    async def _reload(self, pool: Pool, path: Path) -> Reloaded:
        def lost() -> None:
            self._end_waiting(pool)
            for replica in pool.replicas:
                self._keep(pool.recover(replica.seat.index))

        def refuse(task: Task, error: TaskError) -> None:
            self._end(task, FinishReason.ERROR, error=error)

        try:
            old = await Reload(pool, path, refuse=refuse, lost=lost, grace_s=self._grace_s).run()
        except ReloadFailed as error:
            _log.warning("pool %s: the reload failed: %s", pool.id, error)
            raise
        finally:
            pool.reloading = False
        assert pool.model is not None
        self.models.activate(pool.model.id)
        self.models.retire(old.id)
        _log.info("pool %s now serves %s", pool.id, pool.model.id)
        return Reloaded(pool_id=pool.id, model_id=pool.model.id)

    # --- what workers tell -----------------------------------------------------------------------------------------

    def post(self, reports: list[Report]) -> None:
        """Take a worker's reports; any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            self._loop.call_soon_threadsafe(self._apply, reports)

    def _apply(self, reports: list[Report]) -> None:
        for report in reports:
            if isinstance(report, Progress):
                report.task.token(report.text, report.index)
            elif isinstance(report, Begun):
                report.task.start()
            elif isinstance(report, Ended):
                self._end(report.task, report.reason, decode_ms=report.decode_ms, error=report.error)
            elif isinstance(report, ReplicaDown):
                self._replica_down(report)
            elif isinstance(report, HostClosed):
                for pool in self.pools.values():
                    pool.note_closed()

    def _replica_down(self, report: ReplicaDown) -> None:
        pool = next(pool for pool in self.pools.values() if report.replica in pool.replicas)
        index = report.replica.seat.index
        _log.error("pool %s, replica %d on %s is down: %s", pool.id, index, report.replica.device, report.why)
        pool.wake()
        pool.note_closed()
        if not pool.scheduler.any_ready and not pool.away:
            self._end_waiting(pool)
        self._keep(pool.recover(index))

    def _end_waiting(self, pool: Pool) -> None:
        error = PoolUnavailable(f"no replica of pool {pool.id} is alive; send the task again later")
        for task in pool.scheduler.drain_waiting():
            self._end(task, FinishReason.ERROR, error=error)

    def _keep(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run something in the background, for as long as the service lives."""
        task = self._loop.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    def _end(self, task: Task, reason: FinishReason, *, decode_ms: int = 0, error: TaskError | None = None) -> None:
        task.end(reason, decode_ms=decode_ms, error=error)
        self._tasks.note_end(task)
        self._open -= 1
        if self._open == 0:
            self._idle.set()

    # --- health and shutdown ---------------------------------------------------------------------------------------

    def health(self) -> Health:
        """A snapshot, made without asking any worker."""
        pools = tuple(pool.health() for pool in self.pools.values())
        if any(pool.loading or pool.away for pool in self.pools.values()):
            status: Literal["ok", "loading", "degraded"] = "loading"
        elif all(pool.ready and all(replica.alive for replica in pool.replicas) for pool in pools):
            status = "ok"
        else:
            status = "degraded"
        return Health(status=status, pools=pools)

    @property
    def running(self) -> int:
        """Tasks that a worker has taken and not ended."""
        return sum(task.state is TaskState.RUNNING for task in self._tasks)

    async def drain(self, grace_s: float) -> None:
        """Admit nothing, end what waits, let what runs finish within the grace, then end the rest as cancelled."""
        self.closing = True
        for pool in self.pools.values():
            for task in pool.scheduler.drain_waiting():
                self._end(task, FinishReason.CANCELLED)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._idle.wait(), grace_s)
        for task in list(self._tasks):
            if task.state is TaskState.RUNNING:
                self.cancel(task)
        for background in self._background:
            background.cancel()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._idle.wait(), 5.0)  # a worker answers within a step, unless it hangs
