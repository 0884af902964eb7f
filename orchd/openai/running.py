"""Runs the tasks of one request on the server and hands out what they write, of all of them together.

Guarantees:
- Once `running` is entered, the server has accepted every task.
- Once it is left, however that happens, none of them goes on: a task that nobody follows is cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Final

from orchd.client import (
    Client,
    ClientError,
    End,
    Event,
    InvalidRequest,
    Reasoning,
    TaskOptions,
    Token,
    raise_if_failed,
)
from orchd.openai.answers import CompletionDetails, Delta, Finish, PromptDetails, Usage
from orchd.openai.errors import DOES_NOT_FIT, FromServer
from orchd.openai.tasks import Job

KEEP_ALIVE_S: Final = 15.0
"""How often `Run.steps` yields at least, be it nothing."""


@dataclass(frozen=True)
class Step:
    """What happened in one choice.

    Attributes:
        index: Of the choice.
        delta: What was written.
        finish: How it ended; then nothing comes after it.
    """

    index: int
    delta: Delta
    finish: Finish | None = None


@contextlib.asynccontextmanager
async def running(client: Client, jobs: Sequence[Job]) -> AsyncIterator[Run]:
    """The jobs as accepted tasks.

    Raises:
        FromServer: One was refused, or nothing answers.
    """
    run = Run(len(jobs))
    accepted = [asyncio.get_running_loop().create_future() for _ in jobs]
    working = [asyncio.create_task(_work(client, job, one, run)) for job, one in zip(jobs, accepted, strict=True)]
    working.append(asyncio.create_task(run.tick()))
    try:
        try:
            await asyncio.gather(*accepted)
        except ClientError as error:
            raise FromServer(error) from error
        yield run
    finally:
        for task in working:
            task.cancel()
        await asyncio.gather(*working, return_exceptions=True)


async def _work(client: Client, job: Job, accepted: asyncio.Future[None], run: Run) -> None:
    """Submit a task and follow it. When this is cancelled, the client sees to it that the task is, too."""
    try:
        task_id = await _submit(client, job)
    except ClientError as error:
        if not accepted.done():
            accepted.set_exception(error)
        return
    if not accepted.done():
        accepted.set_result(None)
    try:
        async with aclosing(client.follow(task_id)) as events:
            async for event in events:
                run.put(job, event)
    except ClientError as error:
        run.put(job, error)


async def _submit(client: Client, job: Job) -> str:
    *larger, last = job.budgets
    for max_tokens in larger:
        try:
            return await _submit_once(client, job, max_tokens)
        except InvalidRequest as error:
            if DOES_NOT_FIT not in error.message:
                raise
    return await _submit_once(client, job, last)


async def _submit_once(client: Client, job: Job, max_tokens: int) -> str:
    options: TaskOptions = {**job.options, "max_tokens": max_tokens}
    return (await client.submit(prompt=job.prompt, messages=job.messages, **options)).task_id


@dataclass
class _Count:
    """Tokens of one choice."""

    prompt: int
    tokens_in: int = 0
    cached: int = 0
    out: int = 0
    thought: int = 0


@dataclass
class Run:
    """What the tasks of one request do.

    Args:
        going: How many there are.
    """

    going: int
    _queue: asyncio.Queue[tuple[Job, Event | ClientError] | None] = field(default_factory=asyncio.Queue)
    _counts: dict[int, _Count] = field(default_factory=dict)

    def put(self, job: Job, event: Event | ClientError) -> None:
        """Something happened to a job."""
        self._queue.put_nowait((job, event))

    async def tick(self) -> None:
        """Have `steps` yield now and then."""
        while True:
            await asyncio.sleep(KEEP_ALIVE_S)
            self._queue.put_nowait(None)

    async def steps(self) -> AsyncGenerator[list[Step], None]:
        """All that has happened since the last time, until every task has ended.

        Raises:
            FromServer: A task failed or was cancelled, or its stream was lost.
        """
        while self.going:
            items = [await self._queue.get()]
            while not self._queue.empty():
                items.append(self._queue.get_nowait())
            steps: list[Step] = []
            failure: FromServer | None = None
            for job, event in filter(None, items):
                try:
                    steps += self._steps(job, event)
                except FromServer as error:  # what was written before it is told before it
                    failure = error
                    break
            self.going -= sum(step.finish is not None for step in steps)
            yield steps
            if failure is not None:
                raise failure

    def usage(self) -> Usage:
        """Of all that has ended."""
        counts = self._counts.values()
        prompts = {count.prompt: count for count in counts}.values()
        tokens_in, out = sum(one.tokens_in for one in prompts), sum(one.out for one in counts)
        return Usage(
            prompt_tokens=tokens_in,
            completion_tokens=out,
            total_tokens=tokens_in + out,
            prompt_tokens_details=PromptDetails(cached_tokens=sum(one.cached for one in prompts)),
            completion_tokens_details=CompletionDetails(reasoning_tokens=sum(one.thought for one in counts)),
        )

    def _steps(self, job: Job, event: Event | ClientError) -> list[Step]:
        if isinstance(event, ClientError):
            raise FromServer(event)
        count = self._counts.setdefault(job.index, _Count(job.prompt_number))
        if isinstance(event, Token):
            return [Step(job.index, delta) for delta in job.reader.feed(event.t)]
        if isinstance(event, Reasoning):
            count.thought = event.i + 1
            return [Step(job.index, Delta(reasoning_content=event.r))]
        if isinstance(event, End):
            return [self._last(job, event, count)]
        return []

    def _last(self, job: Job, end: End, count: _Count) -> Step:
        try:
            raise_if_failed(end, task_id="")
        except ClientError as error:
            raise FromServer(error) from error
        count.tokens_in, count.cached, count.out = end.tokens_in, end.tokens_cached, end.tokens_out
        if end.finish_reason == "length":
            return Step(job.index, Delta(), "length")
        return Step(job.index, Delta(), "tool_calls" if job.reader.calls else "stop")
