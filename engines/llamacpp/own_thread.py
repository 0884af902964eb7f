"""A call on a thread of its own: with a stack that is large enough, and given up if it takes too long."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_stack_size = threading.Lock()


class NoThread(Exception):
    """The machine has no memory left for a thread."""


class TooLong(Exception):
    """The call takes longer than it may.

    Args:
        thread: Where it goes on; that keeps no process from ending.
    """

    def __init__(self, thread: threading.Thread) -> None:
        super().__init__(thread.name)
        self.thread = thread


def on_own_thread(name: str, call: Callable[[], T], *, stack_bytes: int, limit_s: float | None = None) -> T:
    """What a call returns, or raises.

    Raises:
        NoThread: It was not begun.
        TooLong: It is not done in time, and left behind.
    """
    results: list[T] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, name=name, daemon=True)
    with _stack_size:
        before = threading.stack_size(-(-stack_bytes // 4096) * 4096)
        try:
            thread.start()
        except RuntimeError:
            raise NoThread from None
        finally:
            threading.stack_size(before)
    thread.join(limit_s)
    if thread.is_alive():
        raise TooLong(thread)
    if raised:
        raise raised[0]
    return results[0]
