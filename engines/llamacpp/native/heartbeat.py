"""A sign of life from inside a step on the CPU, for threads that are not in it."""

from __future__ import annotations

import ctypes
import sys
from typing import Any, Final

_SEM_T_BYTES: Final = 64  # more than any Linux libc takes
_AbortCallback = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)  # ``ggml_abort_callback`` of the pinned llama.cpp


class Heartbeat:
    """Counts the nodes of llama.cpp's graph that a step has computed.

    After each of them llama.cpp asks an *abort callback* whether to stop. One in Python would have to wait for the
    interpreter's lock hundreds of times a step. The C library's ``sem_post`` has the signature that is wanted, touches
    nothing but its semaphore, adds one to it, and returns 0, which is "go on"; it costs nothing that can be measured.
    At its largest value it would return -1, hence `begin`.
    """

    def __init__(self) -> None:
        self._semaphore = (ctypes.c_uint32 * (_SEM_T_BYTES // 4))()
        self.address = ctypes.addressof(self._semaphore)
        """For llama.cpp to hand to the callback, like `callback`; this object must outlive the context."""
        self.callback: Any = _sem_post()
        self.begin()

    def begin(self) -> None:
        """A step begins. No callback is running."""
        self._semaphore[0] = 0

    @property
    def count(self) -> int:
        """Nodes since the step began; any thread."""
        return self._semaphore[0]


def _sem_post() -> Any:
    """The function as llama.cpp takes it, NULL where it does not do what is said above."""
    if sys.platform == "linux":
        libc, semaphore = ctypes.CDLL(None), (ctypes.c_uint32 * (_SEM_T_BYTES // 4))()
        if libc.sem_post(semaphore) == 0 and list(semaphore) == [1, *[0] * (_SEM_T_BYTES // 4 - 1)]:
            return ctypes.cast(libc.sem_post, _AbortCallback)
    return _AbortCallback()
