"""Where the command line begins, and how the process leaves, whatever becomes of its output.

0 is success, 1 "no" (not ready, a failed task or reload), 2 "cannot tell" (a wrong option or configuration, no server,
not the right token, an answer that could not be written), 70 a defect in orchd, 130 Ctrl-C, 141 whoever read the answer
has left.
"""

from __future__ import annotations

import os
import sys

from orchd.cli.exits import Exit, output_lost
from orchd.cli.streams import OutputLost, StandardStreams
from orchd.garbage import expect_imports


def main() -> None:
    """The command line. What is called often does not wait for what only other commands need."""
    expect_imports()
    expect_no_tls()
    streams = StandardStreams()
    code: str | int | None
    try:
        code = _run(sys.argv[1:], streams)
    except SystemExit as left:
        code = left.code
    except OutputLost:
        code = None  # see below
    except Exception:  # Python would leave with 1, which is "no"
        sys.excepthook(*sys.exc_info())
        code = Exit.DEFECT
    if streams.lost is not None:
        code = output_lost(streams.lost)
    streams.close()
    sys.exit(code)


def expect_no_tls() -> None:
    """Have no certificates read: orchd speaks plain HTTP only, and aiohttp takes 0.1 s on import to read them all."""
    os.environ.update(SSL_CERT_FILE=os.devnull, SSL_CERT_DIR=os.devnull)


def _run(arguments: list[str], streams: StandardStreams) -> Exit:
    if arguments[:1] == ["health"]:
        from orchd.cli.health import without_typer

        if (code := without_typer(arguments[1:])) is not None:
            return code
    from orchd.cli import group

    group.app(prog_name="orchd", obj=streams)
    return Exit.OK
