"""Loading, one model at a time in the whole process, on a thread of its own so that workers go on decoding."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Protocol, TypeVar

from engines.api import DeviceSpec, Engine, Footprint, LoadedModel, ModelSpec, Vocab
from engines.errors import LoadFailed
from orchd.observer import Observer

CLOSE_S = 5.0
"""How long a load that should end may take to do so; llama.cpp asks whether to go on only now and then."""


class Closeable(Protocol):
    """What can be loaded."""

    def close(self) -> None:
        """Give its memory back."""


T = TypeVar("T")
C = TypeVar("C", bound=Closeable)


class Loader:
    """Event loop thread only; what it loads belongs to whoever it is handed to.

    Args:
        engine: What loads.
        observer: Is told how far each load is.
    """

    def __init__(self, engine: Engine, observer: Observer) -> None:
        self.turn = asyncio.Lock()
        """Held from the look at free memory until it is taken, so that no two pools count on the same."""
        self._engine = engine
        self._observer = observer
        self._closing = False
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self._second_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="beside the loader")
        self._running: set[Future[Any]] = set()

    async def vet(self, spec: ModelSpec) -> Footprint:
        """Open a model where it can do no harm. Raises `engines.errors.LoadFailed`."""
        return await self.run(lambda: self._engine.vet(spec, on_wait=self.check_open))

    async def vocab(self, path: Path, *, beside: bool = False) -> Vocab:
        """Open a model's tokenizer, beside the loading thread if asked to. Raises `engines.errors.LoadFailed`."""
        return await self._load(lambda: self._engine.load_vocab(path), self._second_thread if beside else None)

    async def model(self, spec: ModelSpec, device: DeviceSpec, *, label: str) -> LoadedModel:
        """Load a model on a device. Raises `engines.errors.LoadFailed`."""
        loop = asyncio.get_running_loop()
        began = time.monotonic()

        def progress(share: float) -> None:
            self.check_open()
            loop.call_soon_threadsafe(self._observer.loading, label, share)

        model = await self._load(lambda: self._engine.load(spec, device, on_progress=progress))
        self._observer.loaded(label, time.monotonic() - began)
        return model

    async def run(self, work: Callable[[], T]) -> T:
        """Do something on the loading thread, after what it does now."""
        return await asyncio.wrap_future(self._submit(work))

    def beside(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """Do something beside the loading thread."""
        return asyncio.wrap_future(self._submit(work, self._second_thread))

    def _submit(self, work: Callable[[], T], thread: ThreadPoolExecutor | None = None) -> Future[T]:
        self._running = {future for future in self._running if not future.done()}
        future = (thread or self._thread).submit(work)
        self._running.add(future)
        return future

    async def _load(self, work: Callable[[], C], thread: ThreadPoolExecutor | None = None) -> C:
        future = self._submit(work, thread)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            future.add_done_callback(_close_result)  # nobody is left to take it
            raise

    def discard(self, *unused: Closeable) -> None:
        """Close what nobody uses any more, on the loading thread: giving much memory back takes a while."""

        def close() -> None:
            for one in unused:
                one.close()
            _trim()

        with contextlib.suppress(RuntimeError):  # the thread has ended: the process is about to, with all it holds
            self._submit(close)

    def trim(self) -> None:
        """Give the system back what was closed on other threads."""
        with contextlib.suppress(RuntimeError):
            self._submit(_trim)

    def check_open(self) -> None:
        """Raise `LoadFailed` once `close` was called; for long work on the loading thread."""
        if self._closing:
            raise LoadFailed("the server is shutting down")

    def close(self) -> bool:
        """End the load that is under way, then the thread. Any thread.

        Returns:
            Whether it has ended, within `CLOSE_S`.
        """
        self._closing = True
        for thread in (self._thread, self._second_thread):
            thread.shutdown(wait=False, cancel_futures=True)
        running = [future for future in self._running if not future.done()]  # `wait` does not count cancelled ones
        return not wait(running, CLOSE_S).not_done


def _close_result(future: Future[C]) -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().close()


def _trim() -> None:
    """Make glibc return freed memory: what one vocabulary leaves in pieces, another rarely fits into."""
    with contextlib.suppress(OSError, AttributeError):  # another C library keeps house in another way
        ctypes.CDLL(None).malloc_trim(0)
