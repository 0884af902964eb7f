"""Loading, one model at a time in the whole process, on a thread of its own so that workers go on decoding."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from engines.api import DeviceSpec, Engine, LoadedModel, ModelSpec, Vocab
from orchd.observer import Observer

T = TypeVar("T")


class Loader:
    """Event loop thread only; what it loads belongs to whoever it is handed to.

    Args:
        engine: What loads.
        observer: Is told how far each load is.
    """

    def __init__(self, engine: Engine, observer: Observer) -> None:
        self.engine = engine
        self._observer = observer
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")

    async def vocab(self, path: Path) -> Vocab:
        """Open a model's tokenizer. Raises `engines.errors.LoadFailed`."""
        return await self.run(lambda: self.engine.load_vocab(path))

    async def model(self, spec: ModelSpec, device: DeviceSpec, *, label: str) -> LoadedModel:
        """Load a model on a device. Raises `engines.errors.LoadFailed`."""
        loop = asyncio.get_running_loop()
        began = time.monotonic()

        def progress(share: float) -> None:
            loop.call_soon_threadsafe(self._observer.loading, label, share)

        model = await self.run(lambda: self.engine.load(spec, device, on_progress=progress))
        self._observer.loaded(label, time.monotonic() - began)
        return model

    def run(self, work: Callable[[], T]) -> Awaitable[T]:
        """Do something on the loading thread, after what it does now."""
        return asyncio.get_running_loop().run_in_executor(self._thread, work)

    def close(self) -> None:
        """Wait for the load that is under way, then end the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)
