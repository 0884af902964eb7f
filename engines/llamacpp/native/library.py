"""llama.cpp itself: its backend and its log callback are process-wide, and set up once, on import."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import llama_cpp

from engines.llamacpp.load_log import Line

_log = logging.getLogger("engines.llamacpp")
_LEVELS = {2: logging.DEBUG, 3: logging.WARNING, 4: logging.ERROR}  # llama.cpp's info is our debug
_captures: dict[int, list[Line]] = {}  # thread id -> lines that llama.cpp logged on it


def _on_log(level: int, text: bytes, _user_data: object) -> None:
    line = text.decode("utf-8", "replace").rstrip()
    lines = _captures.get(threading.get_ident())
    if lines is not None:
        lines.append(Line(level, line))
    if line and line != ".":
        _log.log(_LEVELS.get(level, logging.DEBUG), "%s", line)


_keeping = ctypes.PyDLL(None, handle=llama_cpp.llama_cpp._lib._handle)
_log_callback = llama_cpp.llama_log_callback(_on_log)  # must stay referenced
llama_cpp.llama_log_set(_log_callback, ctypes.c_void_p(0))
llama_cpp.llama_backend_init()

version: str = llama_cpp.__version__


def keeping_lock(name: str, arguments: Sequence[Any], result: Any = None) -> Any:
    """A function of llama.cpp that does not give up Python's lock while it runs: for what takes microseconds.

    Every other call through ctypes gives it up, and a busy thread may keep it for `sys.getswitchinterval` then.
    """
    function = _keeping[name]
    function.argtypes, function.restype = list(arguments), result
    return function


@contextlib.contextmanager
def captured() -> Iterator[list[Line]]:
    """Collects what llama.cpp logs on this thread."""
    thread = threading.get_ident()
    lines = _captures[thread] = []
    try:
        yield lines
    finally:
        del _captures[thread]
