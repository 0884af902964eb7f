"""Work that goes on beside the requests: reloads, and replicas that are brought back."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Background:
    """Keeps what it runs from being collected, and ends it all at once. Event loop thread only."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._works: set[asyncio.Task[Any]] = set()

    def run(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Begin it."""
        task = self._loop.create_task(work)
        self._works.add(task)
        task.add_done_callback(self._works.discard)
        return task

    def cancel(self) -> None:
        """Ask all of it to end."""
        for work in self._works:
            work.cancel()

    async def wait(self, timeout_s: float) -> None:
        """Return when all of it has ended, or when the time is over."""
        if self._works:
            await asyncio.wait(self._works, timeout=timeout_s)
