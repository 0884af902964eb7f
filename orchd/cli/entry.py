"""Where the command line begins, and how it ends: with an exit code, whatever becomes of its output."""

from __future__ import annotations

import sys

from orchd.cli.exits import Exit, output_lost
from orchd.cli.streams import OutputLost, StandardStreams


def main() -> None:
    """The command line. What is called often does not wait for what only other commands need."""
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


def _run(arguments: list[str], streams: StandardStreams) -> Exit:
    if arguments[:1] == ["health"]:
        from orchd.cli.health import without_typer

        if (code := without_typer(arguments[1:])) is not None:
            return code
    from orchd.cli import commands

    commands.app(prog_name="orchd", obj=streams)
    return Exit.OK
