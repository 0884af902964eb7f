"""The process's standard streams, whatever stands at their other end: nobody, a full disk, a reader that does not read.

Guarantees, from `StandardStreams` on:
- Descriptors 0 to 2 are open. Otherwise the next file or socket would get such a number, and what is printed with it.
- stderr never raises.
- stdout raises `OutputLost`, and notes it. Rich and Typer would make exit code 1 of a `BrokenPipeError`.
- After `write_aside`, neither raises and neither blocks.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import queue
import select
import sys
import threading
from collections.abc import Callable
from typing import TextIO

MOST_WAITING_BYTES = 1 << 20
"""For a reader that does not read; what comes after is dropped and counted."""

LAST_WORDS_S = 1.0
"""How long the end of the process waits for such a reader."""

Write = Callable[[int, bytes], None]


class OutputLost(Exception):
    """stdout could not be written, so whoever asked has no answer."""


class StandardStreams:
    """Takes the place of `sys.stdout` and `sys.stderr`; made once, before anything is printed."""

    def __init__(self) -> None:
        self.lost: OSError | None = None
        """Why stdout could not be written. The exception itself may have been caught by someone."""
        self._asides: list[Aside] = []
        _open_missing()
        self._out, self._err = _Stream(1, self._answer), _Stream(2, _tell)
        sys.stdout, sys.stderr = _text(self._out, sys.stdout), _text(self._err, sys.stderr)

    def write_aside(self) -> None:
        """From now on nobody who prints or logs waits for whoever reads, nor learns that it could not be written."""
        out, err = Aside(), Aside()
        if os.path.sameopenfile(1, 2):  # a terminal, say: there the order counts
            out = err
        self._asides = [out, err]
        self._out.write_with, self._err.write_with = out.write, err.write

    def close(self) -> None:
        """Wait a moment for what was written aside."""
        for aside in self._asides:
            aside.drain(LAST_WORDS_S)

    def _answer(self, fd: int, data: bytes) -> None:
        if self.lost is None:
            try:
                _write_all(fd, data)
            except OSError as error:
                self.lost = error
                raise OutputLost from error


class Aside:
    """Writes on a thread of its own, in order. Its methods are for any thread.

    The lock is reentrant, and the thread is woken with a `SimpleQueue`, because a finaliser may log at any moment, also
    in the middle of `write`.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._chunks: list[tuple[int, bytes]] = []
        self._waiting_bytes = 0
        self._lost_lines = 0
        self._drained: list[threading.Event] = []
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="standard streams", daemon=True).start()

    def write(self, fd: int, data: bytes) -> None:
        """Have it written, or dropped if too much waits already."""
        with self._lock:
            if self._waiting_bytes + len(data) > MOST_WAITING_BYTES:
                self._lost_lines += _lines(data)
                return
            self._waiting_bytes += len(data)
            self._chunks.append((fd, data))
        self._wake.put(None)

    def drain(self, limit_s: float) -> None:
        """Wait until all is written, or the limit is over."""
        drained = threading.Event()
        with self._lock:
            self._drained.append(drained)
        self._wake.put(None)
        drained.wait(limit_s)

    def _run(self) -> None:
        while True:
            self._wake.get()
            with self._lock:
                chunks, self._chunks = self._chunks, []
                drained, self._drained = self._drained, []
            for fd, group in itertools.groupby(chunks, key=lambda chunk: chunk[0]):
                self._write(fd, b"".join(data for _, data in group))
            for event in drained:
                event.set()

    def _write(self, fd: int, data: bytes) -> None:
        """One write for all that has come together: between two, others may hold the GIL for long."""
        try:
            _write_all(fd, data)
        except OSError:
            lost = _lines(data)
        else:
            lost = 0
        with self._lock:
            self._waiting_bytes -= len(data)
            self._lost_lines += lost
            if lost or self._chunks or not self._lost_lines:
                return
            note, self._lost_lines = f"orchd: {self._lost_lines} lines could not be written here\n", 0
        _tell(fd, note.encode())


class _Stream(io.RawIOBase):
    """Everything that is written to a descriptor goes through one function, which may be exchanged."""

    def __init__(self, fd: int, write_with: Write) -> None:
        self.write_with = write_with
        self._fd = fd
        self.name = f"<descriptor {fd}>"

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def writable(self) -> bool:
        return True

    def write(self, data: bytes, /) -> int:  # type: ignore[override]  # the text layer writes nothing else
        self.write_with(self._fd, bytes(data))
        return len(data)


def _open_missing() -> None:
    """Open descriptors 0 to 2 that are closed: to read an end of file, to fail on an answer, to swallow complaints."""
    for fd, mode in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, mode)  # takes the lowest free number, which this one is


def _text(stream: _Stream, before: TextIO | None) -> TextIO:
    """A terminal that cannot show a character is no reason to fail."""
    encoding = "utf-8" if before is None else before.encoding
    return io.TextIOWrapper(stream, encoding, errors="replace", line_buffering=True)


def _write_all(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(fd, rest) :]
        except BlockingIOError:  # another process has made the terminal or pipe that we share non-blocking
            select.select([], [fd], [])


def _tell(fd: int, data: bytes) -> None:
    """Write it where that can be done."""
    with contextlib.suppress(OSError):
        _write_all(fd, data)


def _lines(data: bytes) -> int:
    return max(1, data.count(b"\n"))
