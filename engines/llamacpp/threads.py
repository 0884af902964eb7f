"""The host threads that compute for a context, in a pool of our own, so that they sleep between two steps.

llama.cpp's default pool spins for milliseconds after each step to save the next one a wake-up. Beside an event loop
that has to write what the step made, on a machine with few cores, that spinning takes the loop's core away. Within a
step the threads spin for each other all the same.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

_MAX_THREADS = 512  # GGML_MAX_N_THREADS


class _Params(ctypes.Structure):
    """``struct ggml_threadpool_params`` of the pinned llama.cpp."""

    _fields_ = (
        ("cpumask", ctypes.c_bool * _MAX_THREADS),
        ("n_threads", ctypes.c_int),
        ("prio", ctypes.c_int),
        ("poll", ctypes.c_uint32),
        ("strict_cpu", ctypes.c_bool),
        ("paused", ctypes.c_bool),
    )


def _loaded(name: str) -> ctypes.CDLL:
    """A library that `llama_cpp` has loaded, by its soname: its path would load a second copy, with state of its own."""
    return ctypes.CDLL(f"lib{name}.so.0", os.RTLD_NOLOAD | os.RTLD_NOW)


class ComputeThreads:
    """Owner of a ``ggml_threadpool``. It is closed after the context that it computes for.

    Args:
        count: Threads, the caller's own included; it takes part in every step.
    """

    def __init__(self, count: int) -> None:
        self._ggml = _loaded("ggml-cpu")
        self._ggml.ggml_threadpool_new.restype = ctypes.c_void_p
        params = _Params(n_threads=count, poll=0)
        self._handle: Any = ctypes.c_void_p(self._ggml.ggml_threadpool_new(ctypes.byref(params)))

    def attach(self, context: Any) -> None:
        """Have a ``llama_context`` compute on these threads."""
        pointer = ctypes.c_void_p(context)
        _loaded("llama").llama_attach_threadpool(pointer, self._handle, self._handle)

    def close(self) -> None:
        """End the threads. Calling it again does nothing."""
        handle, self._handle = self._handle, None
        if handle is not None:
            self._ggml.ggml_threadpool_free(handle)
