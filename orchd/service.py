"""What the routes call: submit, follow, reload, health. It knows tasks and pools, and neither HTTP nor threads.

Event loop thread only, but for `post`, which workers call.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from engines.api import FinishReason
from orchd.errors import (
    UNREADY_RETRY_S,
    DecodeTimeout,
    InvalidParams,
    NotFound,
    PoolUnavailable,
    PoolUnready,
    ReloadFailed,
    ReloadInProgress,
    TaskError,
)
from orchd.models import references
from orchd.models.registry import Registry
from orchd.pools import admission
from orchd.pools.mailbox import Mailbox
from orchd.pools.pool import Pool, PoolState
from orchd.pools.reload import Reload
from orchd.pools.replica import Replica
from orchd.pools.reports import Begun, Ended, InstanceClosed, Progress, ReplicaDown, Report
from orchd.queue.scheduler import Found
from orchd.queue.tasks import Task, TaskState, TaskStore
from orchd.schemas import Accepted, Health, Reloaded, TaskRequest
from orchd.settings.config import TasksConfig
from orchd.task_log import TaskLog

ANSWER_S = 2.0
"""How long a worker may take to end what was cancelled, when the server stops; steps are shorter (`orchd.server`)."""

T = TypeVar("T")
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
        self._tasks = TaskStore(
            retention_s=tasks.retention_s,
            retained_bytes=tasks.retained_bytes,
            cancel_grace_s=tasks.cancel_grace_s,
            clock=clock,
        )
        self._clock = clock
        self._task_log = TaskLog(clock)
        self._idle = asyncio.Event()
        self._idle.set()
        self._open = 0  # accepted tasks that have not ended
        self._loop = asyncio.get_running_loop()
        self.post = Mailbox(self._apply, self._loop).post
        """Takes a worker's reports; any thread."""
        self._background: set[asyncio.Task[Any]] = set()

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
        if task_id is not None and (known := self._tasks.get(task_id)) is not None:
            return self._answer_again(known, request)
        self._check_closing()
        admission.check_input(request)
        pool = admission.choose_pool(self.pools, request)
        with pool.scheduler.reservation(request.priority, task_id):
            task = await admission.prepare(pool, request)
            self._check_closing()
            admission.check_open(pool)
            if (known := self._tasks.get(task.id)) is not None:  # sent twice at the same time
                return self._answer_again(known, request)
            self._tasks.add(task)
            self._open += 1
            self._idle.clear()
            prompt_tokens = len(task.tokens)  # it forgets them once a worker has taken it
            accepted = pool.scheduler.submit(task)
            self._task_log.accepted(task, prompt_tokens)
            return accepted

    def _answer_again(self, task: Task, request: TaskRequest) -> Accepted:
        if task.digest != request.digest():
            raise InvalidParams(
                f"task_id: {task.id} was already used for a different request; use a new one, or omit it"
            )
        assert task.accepted is not None  # set when it was submitted
        self._task_log.repeated(task)
        return task.accepted

    def note_refusal(self, error: TaskError, request: TaskRequest | None = None) -> None:
        """Count a refused submit, of which no request is known if its body could not be read."""
        self.rejected[error.code.value] += 1
        self._task_log.refused(request, error)

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
        task = self._tasks.get(task_id)
        if task is None:
            raise NotFound(f"there is no task {task_id}; it never existed, or its events are no longer kept")
        self._tasks.join(task)
        try:
            yield task
        finally:
            if self._tasks.leave(task, grace_s=grace_s):
                self.cancel(task)

    def sweep(self) -> None:
        """Forget old tasks, cancel abandoned ones, notice hanging workers; to be called a few times a second."""
        for task in self._tasks.sweep():
            self.cancel(task)
        for pool in self.pools.values():
            for replica in pool.stalled():
                self._replica_hangs(pool, replica)

    def cancel(self, task: Task) -> None:
        """End a task as cancelled, wherever it is. Nothing happens if it has ended."""
        pool = self.pools[task.pool_id]
        place = pool.scheduler.cancel(task)
        if place is Found.WAITING:
            self._end(task, FinishReason.CANCELLED)
        elif place is Found.RUNNING:
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
        work = self._keep(self._reload(pool, path))
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
            if pool.stranded:
                self._end_waiting(pool)
            for index in replicas:
                self._keep(pool.recover(index))

        def refuse(task: Task, error: TaskError) -> None:
            self._end(task, FinishReason.ERROR, error=error)

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

    # --- what workers tell -----------------------------------------------------------------------------------------

    def _apply(self, report: Report) -> None:
        try:
            self._apply_one(report)
        except Exception:
            _log.exception("a worker's report could not be applied and is skipped")

    def _apply_one(self, report: Report) -> None:
        if isinstance(report, (Progress, Begun, Ended)):  # a tuple: `|` would make a union each time
            if report.task.state is TaskState.ENDED:
                return  # it was ended when its worker hung
            if isinstance(report, Progress):
                show = report.task.reason if report.reasoning else report.task.token
                show(report.text, report.index)
            elif isinstance(report, Begun):
                report.task.start()
                self._task_log.started(report.task, report.replica.id, report.replica.device)
            else:
                self._end(report.task, report.reason, decode_ms=report.decode_ms, error=report.error)
        elif isinstance(report, ReplicaDown):
            self._replica_down(report)
        elif isinstance(report, InstanceClosed):
            self._pool_of(report.replica).note_closed()

    def _pool_of(self, replica: Replica) -> Pool:
        return next(pool for pool in self.pools.values() if replica in pool.replicas)

    def _replica_down(self, report: ReplicaDown) -> None:
        pool = self._pool_of(report.replica)
        index = report.replica.slots.index
        _log.error("pool %s, replica %d on %s is down: %s", pool.id, index, report.replica.device, report.why)
        pool.note_closed()
        if pool.stranded:
            self._end_waiting(pool)
        self._keep(pool.recover(index))

    def _replica_hangs(self, pool: Pool, replica: Replica) -> None:
        """End the tasks of a replica whose worker hangs, and start no more there until it moves again."""
        _log.error("pool %s, replica %s: the worker of %s hangs in a step", pool.id, replica.id, replica.device)
        hanging = pool.scheduler.note_stall(replica.slots)
        error = DecodeTimeout("the device that ran the task hangs; submit the task again")
        for task in filter(None, map(self._tasks.get, hanging)):
            replica.worker.cancel(task)
            if task.state is not TaskState.ENDED:
                self._end(task, FinishReason.ERROR, error=error)
        if pool.stranded:
            self._end_waiting(pool)

    def _end_waiting(self, pool: Pool) -> None:
        error = PoolUnavailable(f"no replica of pool {pool.id} is alive; submit the task again later")
        for task in pool.scheduler.clear():
            self._end(task, FinishReason.ERROR, error=error)

    def _keep(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run something in the background, for as long as the service lives."""
        task = self._loop.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    def _end(self, task: Task, reason: FinishReason, *, decode_ms: int = 0, error: TaskError | None = None) -> None:
        task.end(reason, decode_ms=decode_ms, error=error)
        self._task_log.ended(task, reason, decode_ms=decode_ms, error=error)
        self._tasks.note_end(task)
        self._open -= 1
        if self._open == 0:
            self._idle.set()

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
        return sum(task.state is TaskState.RUNNING for task in self._tasks)

    async def shut_down(self, grace_s: float) -> None:
        """Admit nothing, end what waits, let what runs finish within the grace, then end the rest as cancelled.

        When it returns every accepted task has its end, from this thread where its worker hangs.
        """
        self.closing = True
        for pool in self.pools.values():
            for task in pool.scheduler.clear():
                self._end(task, FinishReason.CANCELLED)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._idle.wait(), grace_s)
        for task in list(self._tasks):
            if task.state is not TaskState.ENDED:
                self.cancel(task)
        for work in self._background:
            work.cancel()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._idle.wait(), ANSWER_S)
        for task in list(self._tasks):
            if task.state is not TaskState.ENDED:  # whatever its worker says of it later counts for nothing
                self._end(task, FinishReason.CANCELLED)
        if self._background:
            await asyncio.wait(self._background, timeout=ANSWER_S)

    def end_threads(self) -> None:
        """Let the threads for prompts and schemas end; whatever hangs in one is not waited for."""
        for model in filter(None, (pool.model for pool in self.pools.values())):
            model.end_threads()


def _note_unheard(work: asyncio.Task[Any]) -> None:
    """A reload whose caller has left is over. What it raises on purpose has been logged already."""
    if not work.cancelled() and (error := work.exception()) is not None and not isinstance(error, TaskError):
        _log.error("a reload failed after its client had disconnected", exc_info=error)
