"""Short ways to say what a test of the core needs."""

from __future__ import annotations

import array
import itertools

from engines.api import Prompt
from orchd.errors import TaskError
from orchd.queue.tasks import Task
from orchd.schemas import Priority, TaskRequest

_numbers = itertools.count()


class Clock:
    """Monotonic seconds that pass when the test says so."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def make_task(
    priority: Priority = Priority.INTERACTIVE,
    *,
    max_tokens: int = 1,
    pool_id: str = "default",
    prompt: str = "x",
    ignore_eos: bool = False,
    reasoning: bool = False,
) -> Task:
    number = next(_numbers)
    request = TaskRequest(
        priority=priority, prompt=prompt, max_tokens=max_tokens, ignore_eos=ignore_eos, reasoning=reasoning
    )
    task_id = f"00000000-0000-4000-8000-{number:012d}"
    return Task(task_id, request, pool_id, Prompt(array.array("i", [ord(char) for char in prompt])))


def pause_of(refusal: TaskError) -> float:
    """Seconds that a refusal asks its sender to wait."""
    assert refusal.retry_after_s is not None
    return refusal.retry_after_s
