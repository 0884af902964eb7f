"""Commands run as a shell or a terminal would, against a stand-in for the server."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from typing import Any

from typer.testing import CliRunner, Result

from orchd import cli
from testkit import stand_in as s
from testkit.stand_in import TOKEN, StandIn


def orchd(*args: str, stdin: str | bytes | None = None, token: str | None = TOKEN) -> Result:
    return CliRunner().invoke(cli.app, list(args), input=stdin, env={"ORCHD_TOKEN": token})


def spawn(*args: str, term: str = "xterm", **streams: Any) -> subprocess.Popen[str]:
    streams = {"stdin": subprocess.DEVNULL, **streams}
    return subprocess.Popen(
        [sys.executable, "-m", "orchd", *args],
        env={**os.environ, "ORCHD_TOKEN": TOKEN, "TERM": term},
        text=True,
        # A shell's background job ignores Ctrl-C, and hands that on to what it starts: the tests, and then this.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **streams,
    )


def on_terminal(
    *args: str, term: str = "xterm", interrupt_at: str | None = None, typed: Sequence[tuple[str, str]] = ()
) -> tuple[str, int]:
    """What a terminal would be sent, stdout and stderr together, and the exit code.

    Args:
        args: For `orchd`.
        term: ``TERM``.
        interrupt_at: Ctrl-C is pressed once this has been shown.
        typed: What is waited for, and then typed.
    """
    master, slave = pty.openpty()
    keys = deque([*typed, *([(interrupt_at, "\x03")] if interrupt_at else [])])
    with spawn(*args, term=term, stdin=slave, stdout=slave, stderr=slave) as process:
        os.close(slave)
        sent, seen, pressing = b"", 0, False
        try:
            while True:
                if pressing and not select.select([master], [], [], 1)[0]:
                    process.send_signal(signal.SIGINT)  # the last one came between readline's prompt and its wait
                    continue
                if not (chunk := os.read(master, 4096)):
                    break
                pressing = False
                sent += chunk
                while keys and keys[0][0].encode() in sent[seen:]:
                    seen = len(sent)
                    key = keys.popleft()[1]
                    if key == "\x03":  # a session of its own would make it one of the terminal
                        process.send_signal(signal.SIGINT)
                        pressing = True
                    else:
                        os.write(master, key.encode())
        except OSError:  # Linux says so when the last process has left the terminal
            pass
        finally:
            if sys.exc_info()[0] is not None:  # a test that is stopped, such as one that waits for what never comes
                process.kill()
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
