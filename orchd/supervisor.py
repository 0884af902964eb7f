"""What workers report becomes events of tasks; a replica that fails or hangs costs its own tasks and no others.

Event loop thread only, but for `post`, which workers call.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from engines.api import FinishReason
from orchd.background import Background
from orchd.errors import DecodeTimeout, PoolUnavailable
from orchd.open_tasks import OpenTasks
from orchd.pools.mailbox import Mailbox
from orchd.pools.pool import Pool
from orchd.pools.recovery import recover
from orchd.pools.replica import Replica
from orchd.pools.reports import Begun, Ended, InstanceClosed, Progress, ReplicaDown, Report
from orchd.queue.tasks import TaskState

_log = logging.getLogger(__name__)


class Supervisor:
    """Watches over the replicas of all pools.

    Args:
        pools: By id.
        tasks: Those that the replicas' workers report on.
        background: Where lost replicas are brought back.
    """

    def __init__(self, pools: Mapping[str, Pool], tasks: OpenTasks, background: Background) -> None:
        self._pools = pools
        self._tasks = tasks
        self._background = background
        self.post = Mailbox(self._apply, asyncio.get_running_loop()).post
        """Takes a worker's reports; any thread."""

    def check(self) -> None:
        """Find the replicas whose workers hang; to be called a few times a second."""
        for pool in self._pools.values():
            for replica in pool.stalled():
                self._replica_hangs(pool, replica)

    def replicas_lost(self, pool: Pool, *indices: int) -> None:
        """End what waits if nothing is left to run it, and try to bring them back."""
        if pool.stranded:
            self._end_waiting(pool)
        for index in indices:
            self._background.run(recover(pool, index))

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
                self._tasks.start(report.task, report.replica.id, report.replica.device)
            else:
                self._tasks.end(report.task, report.reason, decode_ms=report.decode_ms, error=report.error)
        elif isinstance(report, ReplicaDown):
            self._replica_down(report)
        elif isinstance(report, InstanceClosed):
            self._pool_of(report.replica).note_closed()

    def _pool_of(self, replica: Replica) -> Pool:
        return next(pool for pool in self._pools.values() if replica in pool.replicas)

    def _replica_down(self, report: ReplicaDown) -> None:
        pool = self._pool_of(report.replica)
        index = report.replica.slots.index
        _log.error("pool %s, replica %d on %s is down: %s", pool.id, index, report.replica.device, report.why)
        pool.note_closed()
        self.replicas_lost(pool, index)

    def _replica_hangs(self, pool: Pool, replica: Replica) -> None:
        """End the tasks of a replica whose worker hangs, and start no more there until it moves again."""
        _log.error("pool %s, replica %s: the worker of %s hangs in a step", pool.id, replica.id, replica.device)
        hanging = pool.scheduler.note_stall(replica.slots)
        error = DecodeTimeout("the device that ran the task hangs; submit the task again")
        for task in filter(None, map(self._tasks.store.get, hanging)):
            replica.worker.cancel(task)
            if task.state is not TaskState.ENDED:
                self._tasks.end(task, FinishReason.ERROR, error=error)
        self.replicas_lost(pool)

    def _end_waiting(self, pool: Pool) -> None:
        error = PoolUnavailable(f"no replica of pool {pool.id} is alive; submit the task again later")
        for task in pool.scheduler.clear():
            self._tasks.end(task, FinishReason.ERROR, error=error)
