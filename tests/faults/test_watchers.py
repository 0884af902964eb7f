"""Whoever watches a server is told and never believed: nothing that becomes of its output becomes of it."""

from __future__ import annotations

import contextlib
import logging
import os
import pty
import signal
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchd.observer import Guarded, Summary
from testkit.harness import serving
from testkit.observers import WhenReady
from testkit.process import Process, call, follow, free_port, orchd_serve, pipe_without_reader, submit

LONG = {"prompt": "the", "ignore_eos": True, "temperature": 0}
PROMPTLY_S = 2.0

BROKEN: dict[str, dict[str, Any]] = {
    "stderr is closed": {"redirect": "2>&-"},
    "stderr is full": {"redirect": "2>/dev/full"},
    "the reader of stderr has left": {"stderr": pipe_without_reader},
    "stdout is closed": {"redirect": ">&-"},
    "stdout is full": {"redirect": ">/dev/full"},
    "the reader of stdout has left": {"stdout": pipe_without_reader},
    "the reader of both has left": {"stdout": pipe_without_reader, "redirect": "2>&1"},
    "all are closed": {"redirect": "<&- >&- 2>&-"},
}


@contextlib.contextmanager
def watched(model: Path, home: Path, *args: str, port: int = 0, **streams: Any) -> Iterator[Process]:
    """A server with one slot for a task of many tokens, at a pace that other processes do not upset."""
    (home / "orchd.toml").write_text(f"[[pools]]\nmodel = '{model}'\nslots = 1\nctx = 20000\nthreads = 1\n")
    with orchd_serve("--port", str(port), *args, home=home, **streams) as process:
        yield process


def assert_it_serves_reloads_and_drains(process: Process, port: int) -> None:
    stream = follow(port, submit(port, **LONG, max_tokens=1500))
    assert next(stream)[0] == "started"
    assert call(port, "POST", "/v1/pools/default/reload")[0] == 200
    began = time.monotonic()
    assert call(port, "GET", "/health")[0] == 200
    assert time.monotonic() - began < PROMPTLY_S
    assert list(stream)[-1][1]["finish_reason"] == "length"
    stream = follow(port, submit(port, **LONG, max_tokens=1500))
    assert next(stream)[0] == "started"
    process.send(signal.SIGTERM)
    assert list(stream)[-1][1]["finish_reason"] == "length"
    assert process.wait() == 0


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_output_that_cannot_be_written(tiny_model_path: Path, tmp_path: Path, broken: dict[str, Any]) -> None:
    streams = {name: value() if callable(value) else value for name, value in broken.items()}
    port = free_port()
    with watched(tiny_model_path, tmp_path, port=port, **streams) as process:
        process.wait_healthy(port)
        opened = [os.readlink(f"/proc/{process.popen.pid}/fd/{fd}") for fd in range(3)]
        assert not [path for path in opened if path.startswith(("socket:", "anon_inode:"))], "printed into by chance"
        assert_it_serves_reloads_and_drains(process, port)
        assert "Traceback" not in process.stderr + process.stdout
    for fd in {value for value in streams.values() if isinstance(value, int)}:
        os.close(fd)


def test_a_reader_that_leaves_while_it_serves(tiny_model_path: Path, tmp_path: Path) -> None:
    """As `grep -m1 ready` does."""
    reader, writer = os.pipe()
    with watched(tiny_model_path, tmp_path, stderr=writer) as process:
        os.close(writer)
        port = process.wait_ready()
        assert os.read(reader, 1 << 16).startswith(b"20")
        stream = follow(port, submit(port, **LONG, max_tokens=1500))
        assert next(stream)[0] == "started"
        os.close(reader)
        assert list(stream)[-1][1]["finish_reason"] == "length"
        assert_it_serves_reloads_and_drains(process, port)


def test_a_reader_that_does_not_read(tiny_model_path: Path, tmp_path: Path) -> None:
    """The pipe is full, so that a write would wait for it, on the event loop or wherever something is logged."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * 4096)
    os.set_blocking(writer, True)
    with watched(tiny_model_path, tmp_path, "--verbose", stderr=writer) as process:
        assert_it_serves_reloads_and_drains(process, process.wait_ready())
    os.close(reader)
    os.close(writer)


def test_a_terminal_that_stands_still(tiny_model_path: Path, tmp_path: Path) -> None:
    """As after Ctrl-S. Rich draws its bars there from a thread of its own."""
    master, slave = pty.openpty()
    shown: list[bytes] = []

    def look() -> None:
        with contextlib.suppress(OSError):
            while data := os.read(master, 4096):
                shown.append(data)

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    with watched(tiny_model_path, tmp_path, stderr=slave, TERM="xterm") as process:
        port = process.wait_ready()
        termios.tcflow(slave, termios.TCOOFF)
        before = len(shown)
        stream = follow(port, submit(port, **LONG, max_tokens=1500))
        assert call(port, "POST", "/v1/pools/default/reload")[0] == 200
        assert list(stream)[-1][1]["finish_reason"] == "length"
        began = time.monotonic()
        assert call(port, "GET", "/health")[0] == 200
        assert time.monotonic() - began < PROMPTLY_S
        assert len(shown) == before
        termios.tcflow(slave, termios.TCOON)
        process.until(lambda: b"now serves" in b"".join(shown[before:]), "what waited is shown")
        process.send(signal.SIGTERM)
        assert process.wait() == 0
    os.close(slave)
    looking.join(10)
    os.close(master)
    assert b"stopped" in b"".join(shown)


class Unreliable(WhenReady):
    """Fails whatever it is told."""

    def __init__(self, tell: Any, error: BaseException) -> None:
        super().__init__(tell)
        self.error = error

    def loading(self, label: str, share: float) -> None:
        raise self.error

    def loaded(self, label: str, seconds: float) -> None:
        raise self.error

    def ready(self, summary: Summary) -> None:
        super().ready(summary)
        raise self.error

    def stopping(self, running: int) -> None:
        raise self.error

    def stopped(self) -> None:
        raise self.error


ERRORS = (RuntimeError("a defect"), BrokenPipeError(), SystemExit(1))


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
async def test_an_observer_that_fails(tiny_model_path: Path, error: BaseException) -> None:
    async with serving(tiny_model_path, observer=lambda tell: Unreliable(tell, error)) as server:
        assert (await server.request("POST", "/v1/pools/default/reload")).status == 200
        assert (await server.run(max_tokens=4))[-1].data["finish_reason"] == "length"


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_what_an_observer_raises_goes_to_the_log(error: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    summary = Summary(url="", token_origin="", token_file=None, pools=())
    told: list[Summary] = []
    guarded = Guarded(Unreliable(told.append, error))
    guarded.loading("a", 0.5)
    guarded.loaded("a", 1.0)
    guarded.ready(summary)
    guarded.stopping(1)
    guarded.stopped()
    assert told == [summary]
    assert [record.exc_info and record.exc_info[1] for record in caplog.records] == [error] * 5
