"""The host threads that compute for a context, in pools of our own, so that they sleep between two steps.

llama.cpp's default pool spins for milliseconds after each step to save the next one a wake-up. Beside an event loop
that has to write what the step made, on a machine with few cores, that spinning takes the loop's core away. Within a
step the threads spin for each other all the same, so they may be kept on one CPU each: two of them on one CPU, while
another program has the next, would each spin out its time there waiting for the other.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from engines.llamacpp.native.library import loaded

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


def _cpu_function(name: str, result: Any, *arguments: Any) -> Any:
    """A function of the CPU backend, which ggml knows by name whichever of its libraries was chosen."""
    ggml = loaded("ggml")
    ggml.ggml_backend_reg_by_name.restype = ctypes.c_void_p
    ggml.ggml_backend_reg_get_proc_address.restype = ctypes.c_void_p
    backend = ctypes.c_void_p(ggml.ggml_backend_reg_by_name(b"CPU"))
    address = ggml.ggml_backend_reg_get_proc_address(backend, name.encode())
    return ctypes.CFUNCTYPE(result, *arguments)(address)


class ComputeThreads:
    """Owner of two ``ggml_threadpool``s: one of all threads, and one of the caller alone, who computes too.

    They are closed after the context that they compute for.

    Args:
        context: A ``llama_context``.
        count: Threads, the caller included.
        cpus: A CPU for each of them to be kept on, or none.
    """

    def __init__(self, context: Any, count: int, cpus: Sequence[int] = ()) -> None:
        self.count = count
        if any(cpu >= _MAX_THREADS for cpu in cpus):
            cpus = ()  # ggml's masks do not reach so far
        self._callers_cpu = max(cpus, default=None)  # ggml takes them in ascending order, and the caller last
        self._kept: int | None = None  # the thread that stays there
        self._context = ctypes.c_void_p(context)
        self._llama = loaded("llama")
        new_pool = _cpu_function("ggml_threadpool_new", ctypes.c_void_p, ctypes.POINTER(_Params))
        self._free_pool = _cpu_function("ggml_threadpool_free", None, ctypes.c_void_p)
        self._pools: dict[int, Any] = {}
        for size in {1, count}:
            params = _Params(n_threads=size, poll=0, strict_cpu=True)
            if size > 1:
                for cpu in cpus:
                    params.cpumask[cpu] = True
            self._pools[size] = ctypes.c_void_p(new_pool(ctypes.byref(params)))
        self._used = 0
        self.use(count)

    def use(self, count: int) -> None:
        """Compute the next steps with all threads, or with 1; the calling thread stays on its CPU from then on."""
        if self._callers_cpu is not None and self._kept != threading.get_ident():
            self._kept = threading.get_ident()
            with contextlib.suppress(OSError):  # it was taken from this process meanwhile
                os.sched_setaffinity(0, {self._callers_cpu})
        if count != self._used:
            pool = self._pools[count]
            self._llama.llama_set_n_threads(self._context, count, count)
            self._llama.llama_attach_threadpool(self._context, pool, pool)
            self._used = count

    def close(self) -> None:
        """End the threads. Calling it again does nothing."""
        pools, self._pools = self._pools, {}
        for pool in pools.values():
            self._free_pool(pool)


@contextlib.contextmanager
def free_to_move() -> Iterator[None]:
    """Let the calling thread, whatever it computes meanwhile, run on the same CPUs as before when this is left."""
    if not hasattr(os, "sched_getaffinity"):
        yield
        return
    cpus = os.sched_getaffinity(0)
    try:
        yield
    finally:
        os.sched_setaffinity(0, cpus)
