"""Commands run as a shell or a terminal would, against a stand-in for the server."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from typing import Any

from typer.testing import CliRunner, Result

from orchd.cli.commands import app
from testkit import stand_in as s
from testkit.stand_in import TOKEN, StandIn


def orchd(*args: str, stdin: str | bytes | None = None, token: str | None = TOKEN) -> Result:
    return CliRunner().invoke(app, list(args), input=stdin, env={"ORCHD_TOKEN": token})


def spawn(*args: str, **streams: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "orchd", *args],
        env={**os.environ, "ORCHD_TOKEN": TOKEN, "TERM": "xterm"},
        text=True,
        # A shell's background job ignores Ctrl-C, and hands that on to what it starts: the tests, and then this.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **streams,
    )


def on_terminal(*args: str) -> tuple[str, int]:
    """What a terminal would be sent, stdout and stderr together, and the exit code."""
    master, slave = pty.openpty()
    with spawn(*args, stdin=slave, stdout=slave, stderr=slave) as process:
        os.close(slave)
        sent = b""
        try:
            while chunk := os.read(master, 4096):
                sent += chunk
        except OSError:  # Linux says so when the last process has left the terminal
            pass
        os.close(master)
        return sent.decode(), process.wait(20)


def one_line(text: str) -> str:
    assert text.startswith("orchd: ")
    assert text.endswith("\n")
    assert text.count("\n") == 1
    assert "Traceback" not in text
    return text


def answering(server: StandIn, *pieces: str, reason: str = "stop") -> None:
    server.on("POST /v1/tasks", s.accept())
    tokens = [s.token(n, piece) for n, piece in enumerate(pieces, 1)]
    server.on("GET stream", s.stream(s.started(), *tokens, s.end(len(pieces) + 1, reason)))
