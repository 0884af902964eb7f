"""The thread that owns a device: takes tasks, steps its models in turn, tells what happened once per step.

Guarantees:
- every task it took gets exactly one `Ended`, whatever a model does: a step that raises ends the tasks it was stepping;
- a freed slot is filled in the next round, straight from the scheduler, without the event loop;
- each model is told what the others do, so that a prompt in one does not hold up the streams of another;
- a task that is cancelled is gone before the next step of any model;
- a model is touched by this thread alone from the moment it is adopted until it is closed here.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

from engines.api import ALONE, Beside, FinishReason, LoadedModel
from engines.errors import EngineDead, EngineError
from orchd.errors import TaskError, WorkerReset
from orchd.pools.outcomes import Outcomes
from orchd.pools.replica import Instance, Replica
from orchd.pools.reports import InstanceClosed, ReplicaDown, Report
from orchd.queue.tasks import Task

_log = logging.getLogger(__name__)

MAX_FAILURES = 3
"""Failed steps in a row after which a replica is given up and loaded anew."""


def _reset() -> TaskError:
    return WorkerReset("the worker that ran the task was reset; submit the task again")


def _discard(reports: list[Report]) -> None:
    """Nobody listens."""


class Worker:
    """Owns a device: takes tasks for its replicas, steps their models in turn, and tells what happened.

    Args:
        device: Name of the device, for the thread's name and messages.
        clock: Monotonic seconds.
    """

    def __init__(self, device: str, *, clock: Callable[[], float]) -> None:
        self.device = device
        self.replicas: list[Replica] = []
        self._post: Callable[[list[Report]], None] = _discard  # nobody listens before `start`
        self._clock = clock
        self._wake = threading.Event()
        self._commands: deque[Callable[[], None]] = deque()
        self._outcomes = Outcomes(device, clock=clock)
        self._stopping = False
        self._moved_at: float | None = None  # when it last began something; None while it is idle
        self._stepping: LoadedModel | None = None
        self._beat = 0, 0.0  # the last heartbeat that differed from the one before, and when it was seen
        self._thread = threading.Thread(target=self._run, name=f"worker {device}", daemon=True)

    # --- any thread ------------------------------------------------------------------------------------------------

    def start(self, post: Callable[[list[Report]], None]) -> None:
        """Start the thread. ``post`` takes each round's reports, in order, on that thread."""
        self._post = post
        self._thread.start()

    def stop(self) -> None:
        """Ask the thread to close its models and end. Tasks that still run are ended as cancelled."""
        self._stopping = True
        self._wake.set()

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread to end; False if it has not."""
        if self._thread.ident is not None:  # it was started
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def wake(self) -> None:
        """There may be something to do."""
        self._wake.set()

    def do(self, command: Callable[[], None]) -> None:
        """Run something on the worker's thread, between two rounds."""
        self._commands.append(command)
        self._wake.set()

    def cancel(self, task: Task) -> None:
        """End a task it is running; nothing happens if it has ended meanwhile."""
        self.do(lambda: self._cancel(task))

    def adopt(self, replica: Replica, instance: Instance) -> None:
        """Own a model from now on: step it, and close it once it is not the replica's current one."""
        self.do(lambda: self._adopt(replica, instance))

    def end_tasks(self, replica: Replica, error: TaskError) -> None:
        """End whatever a replica still runs, with an error."""
        self.do(lambda: self._end_tasks(replica, error))

    def stalled_s(self) -> float:
        """Seconds in which nothing was seen of it, neither a step's end nor progress within one; 0 if it is idle.

        For one thread, which asks several times a second.
        """
        moved_at, model, now = self._moved_at, self._stepping, self._clock()
        if moved_at is None:
            return 0.0
        if model is not None and (count := model.heartbeat) != self._beat[0]:
            self._beat = count, now
        return now - max(moved_at, self._beat[1])

    # --- its own thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping:
            if not self.round():
                self._moved_at = None
                self._wake.wait()
                self._wake.clear()  # a round follows, so nothing is missed that was set until now
        self._obey()
        for replica in self.replicas:
            for instance in replica.instances:
                self._outcomes.lost(replica, instance, FinishReason.CANCELLED)
                self._close(instance)
            replica.instances.clear()
        self._flush()

    def round(self) -> bool:
        """Obey commands, fill free slots, step every model once. Returns whether there was anything to step."""
        self._moved_at = self._clock()
        self._obey()
        stepped = False
        for replica in self.replicas:
            self._fill(replica)  # all of them before the first step, which is told what the others have to do
        for replica in self.replicas:
            for instance in list(replica.instances):
                self._obey()
                if instance.tasks:
                    stepped = True
                    self._flush()  # what is known need not wait for a step that may be long
                    self._step(replica, instance)
                self._retire(replica, instance)
        self._flush()
        return stepped

    def _obey(self) -> None:
        while self._commands:
            try:
                self._commands.popleft()()
            except Exception:
                _log.exception("a command failed on %s", self.device)

    def _fill(self, replica: Replica) -> None:
        while (found := replica.scheduler.next_for(replica.slots)) is not None:
            task, instance = found
            self._adopt(replica, instance)
            self._outcomes.begun(replica, task)
            try:
                instance.model.admit(task.sequence())
            except Exception as error:
                _log.exception("task %s could not be admitted", task.id)
                self._outcomes.refused(replica, task)
                if isinstance(error, EngineDead):  # it would refuse every other task as well
                    self._abandon(replica, instance, error)
                continue
            instance.tasks[task.id] = task
            replica.tokens_in += len(task.tokens)

    def _step(self, replica: Replica, instance: Instance) -> None:
        streams_alone = instance.streams == len(instance.tasks)
        self._moved_at = began = self._clock()
        self._stepping = instance.model
        try:
            events = instance.model.step(self._beside(instance))
        except Exception as error:
            self._recover(replica, instance, error)
            return
        finally:
            self._stepping = None
        if streams_alone:
            instance.streams_s = self._clock() - began
        instance.failures = 0
        for event in events:
            self._outcomes.stepped(replica, instance, event)

    def _beside(self, instance: Instance) -> Beside:
        """What the other models here do between two steps of this one."""
        others = [
            other for replica in self.replicas for other in replica.instances if other is not instance and other.tasks
        ]
        if not others:
            return ALONE
        streams = [(other.streams, len(other.tasks), other.streams_s) for other in others]
        return Beside(
            streams=sum(count for count, _, _ in streams),
            streams_s=sum(seconds for count, _, seconds in streams if count),
            prompts=sum(count < tasks for count, tasks, _ in streams),
        )

    def _recover(self, replica: Replica, instance: Instance, error: Exception) -> None:
        """A step failed: its tasks are lost, the model starts over, or is given up after the third time in a row."""
        unexpected = error if not isinstance(error, EngineError) else None
        _log.error("a step on %s failed: %s", self.device, error, exc_info=unexpected)
        lost = WorkerReset("the step that ran the task failed; submit the task again")
        self._outcomes.lost(replica, instance, FinishReason.ERROR, lost)
        instance.failures += 1
        if instance.failures < MAX_FAILURES:
            try:
                instance.model.reset()
                return
            except Exception as again:
                error = again
        self._abandon(replica, instance, error)

    def _abandon(self, replica: Replica, instance: Instance, error: Exception) -> None:
        """A model is beyond repair: with it goes its replica, unless a reload has replaced it already."""
        if instance is replica.slots.instance:
            self._give_up(replica, str(error))
        else:
            self._outcomes.lost(replica, instance, FinishReason.ERROR, _reset())  # and then it is retired

    def _give_up(self, replica: Replica, why: str) -> None:
        """Close everything a replica has; whoever listens to `ReplicaDown` brings it back."""
        replica.scheduler.set_ready(replica.slots, ready=False)
        replica.setbacks += 1
        for instance in replica.instances:
            self._outcomes.lost(replica, instance, FinishReason.ERROR, _reset())
            self._close(instance)
        replica.instances.clear()
        self._outcomes.add(ReplicaDown(replica, why))

    def _adopt(self, replica: Replica, instance: Instance) -> None:
        if instance not in replica.instances:
            replica.instances.append(instance)

    def _end_tasks(self, replica: Replica, error: TaskError) -> None:
        for instance in replica.instances:
            self._outcomes.taken_away(replica, instance, error)

    def _cancel(self, task: Task) -> None:
        for replica in self.replicas:
            for instance in replica.instances:
                if instance.tasks.get(task.id) is task:
                    self._outcomes.cancelled(replica, instance, task)

    def _retire(self, replica: Replica, instance: Instance) -> None:
        """Close a model that was replaced and has nothing left to do."""
        if instance is not replica.slots.instance and not instance.tasks and instance in replica.instances:
            self._close(instance)
            replica.instances.remove(instance)
            self._outcomes.add(InstanceClosed(replica))

    def _close(self, instance: Instance) -> None:
        try:
            instance.model.close()
        except Exception:
            _log.exception("a model on %s could not be closed; its memory may leak", self.device)

    def _flush(self) -> None:
        if reports := self._outcomes.take():
            self._post(reports)
