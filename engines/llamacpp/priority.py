"""Work that gives way to running sequences: opening a model takes seconds of a core."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

GIVE_WAY = 5
"""Nice value: beside a thread that decodes on the same core it gets a quarter of the time."""

T = TypeVar("T")


def give_way(process: int) -> None:
    """Give one of our processes, or on Linux a thread by its native id, less time than the others. No way back."""
    with contextlib.suppress(OSError):  # it has ended
        os.setpriority(os.PRIO_PROCESS, process, os.getpriority(os.PRIO_PROCESS, 0) + GIVE_WAY)


def run_aside(work: Callable[[], T]) -> T:
    """Do something on a thread of its own that gives way.

    For work outside Python's lock: who holds that and gets no time would hold up everyone.
    """

    def start() -> None:
        if sys.platform == "linux":  # elsewhere a nice value is the whole process's
            give_way(threading.get_native_id())

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="aside", initializer=start) as aside:
        return aside.submit(work).result()
