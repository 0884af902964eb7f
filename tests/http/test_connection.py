"""What an event loop says of connections that it cannot take."""

from __future__ import annotations

import asyncio
import errno
import logging
from typing import Any

import pytest

from orchd.http.connection import COMPLAINT_S, _Complaints


class Loop(asyncio.SelectorEventLoop):
    """One whose time stands where the test puts it, and that keeps what it would log."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 1000.0
        self.told: list[dict[str, Any]] = []

    def time(self) -> float:
        return self.now_s

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        self.told.append(context)


NO_DESCRIPTOR = {
    "message": "socket.accept() out of system resource",
    "exception": OSError(errno.EMFILE, "Too many open files"),
}


@pytest.mark.parametrize(
    "context",
    [
        {"message": "Task exception was never retrieved", "exception": ValueError("a defect")},
        {"message": "Fatal error on transport", "exception": OSError(errno.EIO, "Input/output error")},
        {"message": "socket.accept() out of system resource"},
    ],
)
def test_what_nobody_catches_is_told_as_ever(context: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop()
    _Complaints()(loop, context)
    loop.close()
    assert loop.told == [context]
    assert caplog.records == []


def test_a_connection_that_cannot_be_taken_is_told_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    loop, complain = Loop(), _Complaints()
    counts = []
    for seconds in (0, 1, COMPLAINT_S - 2, 1.5, 1):
        loop.now_s += seconds
        complain(loop, NO_DESCRIPTOR)
        counts.append(len(caplog.records))
    loop.close()
    assert counts == [1, 1, 1, 2, 2]
    assert loop.told == []
    assert {(record.levelno, record.getMessage()) for record in caplog.records} == {
        (logging.ERROR, "cannot accept more connections (Too many open files); allow more open files with: ulimit -n")
    }
