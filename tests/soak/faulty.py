"""``python -m tests.soak.faulty serve …``: `orchd`, but llama.cpp's steps are slow now and then, and some hang.

How many and how long is said in the environment.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import random
import signal
import threading
import time
from typing import Any

from engines.llamacpp.model import LlamaModel
from tests.soak.server import GIVE_BACK

SLOW_S = 0.2
"""Long beside a step of the tiny model, and no hang."""


def spoil_steps(*, slow: float, hang: float, hang_s: float, seed: int) -> None:
    """Of all steps, make such shares slow, or hang for so long.

    One worker at a time: whoever hangs holds the lock, so that the other one is there to take its tasks.
    """
    step = LlamaModel.step
    chance = random.Random(seed)
    hanging = threading.Lock()

    def spoilt(model: LlamaModel, *args: Any, **kwargs: Any) -> Any:
        drawn = chance.random()
        if drawn < hang and hanging.acquire(blocking=False):
            try:
                time.sleep(hang_s)
            finally:
                hanging.release()
        elif drawn < hang + slow:
            time.sleep(SLOW_S)
        return step(model, *args, **kwargs)

    LlamaModel.step = spoilt  # type: ignore[assignment,method-assign]  # for the process's whole life


def give_back_on_signal() -> None:
    """On `GIVE_BACK`, hold no memory that nothing needs."""

    def give_back(*_: object) -> None:
        gc.collect()
        with contextlib.suppress(AttributeError):  # another libc
            ctypes.CDLL(None).malloc_trim(0)

    signal.signal(GIVE_BACK, give_back)


if __name__ == "__main__":
    from orchd.cli import main

    give_back_on_signal()

    spoil_steps(
        slow=float(os.environ["SOAK_SLOW"]),
        hang=float(os.environ["SOAK_HANG"]),
        hang_s=float(os.environ["SOAK_HANG_S"]),
        seed=int(os.environ["SOAK_SEED"]),
    )
    main()
