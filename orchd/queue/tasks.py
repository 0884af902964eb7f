"""A task from its acceptance to the end of its retention."""

from __future__ import annotations

import enum
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from engines.api import FinishReason, Grammar, Prompt, SamplingParams, Sequence
from orchd.errors import TaskError
from orchd.queue.events import EventLog
from orchd.schemas import Accepted, End, ErrorBody, Priority, Reasoning, Started, TaskRequest, Token


class TaskState(enum.Enum):
    """Where a task is. Each accepted task gets to `ENDED` exactly once."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    ENDED = enum.auto()


TASK_BYTES = 1152
"""What an ended task takes besides its events: itself, its id, its first answer, what is left of its request, and its
places in tables. By tracemalloc on CPython 3.11, rounded up."""

TRANSITIONS: dict[TaskState, frozenset[TaskState]] = {
    TaskState.WAITING: frozenset({TaskState.RUNNING, TaskState.ENDED}),
    TaskState.RUNNING: frozenset({TaskState.ENDED}),
    TaskState.ENDED: frozenset(),
}


@dataclass(eq=False, slots=True)
class Task:
    """One request and what became of it.

    Attributes:
        id: A UUID's text.
        request: As it came in, for a reload tokenises it again; no longer waiting, without its prompt and other texts.
        pool_id: The pool that took it.
        prompt: In the pool's current vocabulary; no longer waiting, empty.
        grammar: Its schema, for the same vocabulary; likewise.
        accepted: The answer its sender got, kept for a retry with the same id.
        log: Its events. Event loop thread only, like `state`.
        tokens_in: Prompt tokens; 0 while it waits.
        tokens_read: Prompt tokens processed so far. Written by its worker, like what follows.
        tokens_cached: Those of them that were not computed again.
        tokens_out: Output tokens so far.
        first_token_at: Monotonic seconds of its first output token.
        shown: Whether any text was reported.
        digest: Of its request, which a retry with the same id is compared with.
    """

    id: str
    request: TaskRequest
    pool_id: str
    prompt: Prompt
    grammar: Grammar | None = None
    accepted: Accepted | None = None
    state: TaskState = TaskState.WAITING
    log: EventLog = field(default_factory=EventLog)
    tokens_in: int = 0
    tokens_read: int = 0
    tokens_cached: int = 0
    tokens_out: int = 0
    first_token_at: float | None = None
    shown: bool = False
    digest: bytes = field(init=False)

    def __post_init__(self) -> None:
        self.digest = self.request.digest()

    @property
    def retained_bytes(self) -> int:
        """What it takes while it is kept after its end."""
        return TASK_BYTES + self.log.size_bytes

    @property
    def reading(self) -> bool:
        """Whether its prompt is being processed: it runs and has no output yet."""
        return self.state is TaskState.RUNNING and self.first_token_at is None

    @property
    def tokens(self) -> Seq[int]:
        """Its prompt's tokens."""
        return self.prompt.tokens

    @property
    def priority(self) -> Priority:
        """Its priority."""
        return self.request.priority

    def sequence(self) -> Sequence:
        """The task as an engine sees it."""
        request = self.request
        seed = uuid.UUID(self.id).int & 0xFFFFFFFF if request.seed is None else request.seed
        return Sequence(
            key=self.id,
            tokens=self.prompt.tokens,
            reply=self.prompt.reply,
            max_tokens=request.max_tokens,
            stop=request.stop,
            sampling=SamplingParams(
                temperature=request.temperature,
                top_k=request.top_k,
                top_p=request.top_p,
                min_p=request.min_p,
                repeat_penalty=request.repeat_penalty,
                seed=seed,
                ignore_eos=request.ignore_eos,
            ),
            urgent=request.priority is Priority.INTERACTIVE,
            grammar=self.grammar,
        )

    def start(self) -> None:
        """A worker took it."""
        self._move(TaskState.RUNNING)
        answer = self.accepted
        assert answer is not None  # set before the scheduler sees the task
        self.log.append(Started(queue_position=answer.queue_position, predicted_start_ms=answer.predicted_start_ms))

    def token(self, text: str, index: int) -> None:
        """Text is ready."""
        self.log.append(Token(t=text, i=index))

    def reason(self, text: str, index: int) -> None:
        """More of what the model thinks."""
        self.log.append(Reasoning(r=text, i=index))

    def end(self, reason: FinishReason, *, decode_ms: int = 0, error: TaskError | None = None) -> None:
        """Its one end."""
        self._move(TaskState.ENDED)
        body = None if error is None else ErrorBody(code=error.code, message=str(error))
        self.log.append(
            End(
                tokens_in=self.tokens_in,
                tokens_cached=self.tokens_cached,
                tokens_out=self.tokens_out,
                decode_ms=decode_ms,
                finish_reason=reason,
                error=body,
            )
        )

    def _move(self, to: TaskState) -> None:
        if to not in TRANSITIONS[self.state]:
            raise RuntimeError(f"task {self.id} cannot go from {self.state.name} to {to.name}")
        if self.state is TaskState.WAITING:  # its engine has what it needs, or will never need it
            self.request = self.request.without_prompt()
            self.tokens_in = len(self.tokens)
            self.prompt, self.grammar = Prompt(()), None
        self.state = to


class TaskStore:
    """Every task that can still be asked about. Event loop thread only.

    Args:
        retention_s: How long a task stays after its end.
        retained_bytes: Most bytes of ended tasks; the ones that ended first go first.
        cancel_grace_s: How long a task that had a listener runs on with none; the last to leave may ask for less.
        clock: Monotonic seconds.
    """

    def __init__(
        self, *, retention_s: float, retained_bytes: int, cancel_grace_s: float, clock: Callable[[], float]
    ) -> None:
        self._retention_s = retention_s
        self._retained_bytes = retained_bytes
        self._cancel_grace_s = cancel_grace_s
        self._clock = clock
        self._tasks: dict[str, Task] = {}
        self._ended: OrderedDict[str, float] = OrderedDict()  # oldest first
        self._left: dict[str, float] = {}  # had a listener, has none: when its grace is over
        self.ended_bytes = 0

    def __len__(self) -> int:
        return len(self._tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(self._tasks.values())

    def get(self, task_id: str) -> Task | None:
        """The task, if it is still kept."""
        return self._tasks.get(task_id)

    def add(self, task: Task) -> None:
        """Keep a task."""
        self._tasks[task.id] = task

    def note_end(self, task: Task) -> None:
        """Begin a task's retention."""
        self._left.pop(task.id, None)
        if self._tasks.get(task.id) is task:
            self._ended[task.id] = self._clock()
            self.ended_bytes += task.retained_bytes
            while self.ended_bytes > self._retained_bytes and len(self._ended) > 1:
                self._evict()

    def join(self, task: Task) -> None:
        """A listener came."""
        task.log.listeners += 1
        self._left.pop(task.id, None)

    def leave(self, task: Task, *, grace_s: float | None = None) -> bool:
        """A listener went. If it was the last and the task runs on, its grace begins: what is configured, or less.

        Returns:
            Whether there is none, so that the task is abandoned already.
        """
        task.log.listeners -= 1
        if task.log.listeners or task.state is TaskState.ENDED:
            return False
        grace_s = self._cancel_grace_s if grace_s is None else min(grace_s, self._cancel_grace_s)
        if grace_s > 0:
            self._left[task.id] = self._clock() + grace_s
        return grace_s <= 0

    def sweep(self) -> list[Task]:
        """Forget tasks past their retention; returns those whose listeners have been gone for the grace."""
        now = self._clock()
        while self._ended and now - next(iter(self._ended.values())) >= self._retention_s:
            self._evict()
        abandoned = [task_id for task_id, until in self._left.items() if now >= until]
        for task_id in abandoned:
            del self._left[task_id]
        return [self._tasks[task_id] for task_id in abandoned]

    def _evict(self) -> None:
        task_id, _ = self._ended.popitem(last=False)
        self.ended_bytes -= self._tasks.pop(task_id).retained_bytes
