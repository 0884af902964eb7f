"""The command line: which commands there are, and how the process leaves.

0 is success, 1 "no" (not ready, a failed task or reload), 2 "cannot tell" (a wrong option or configuration, no server,
not the right token, an answer that could not be written), 70 a defect in orchd, 130 Ctrl-C, 141 whoever read the answer
has left.
"""

from __future__ import annotations

import importlib
import platform
import sys
from typing import Annotated, Final

import typer
from typer.core import TyperCommand, TyperGroup

from orchd import __version__
from orchd.cli.options import examples
from orchd.cli.streams import OutputLost, StandardStreams

COMMANDS: Final = ("serve", "health", "run", "reload", "check")
"""In the order of the help. Each is the module of that name in `orchd.cli.commands`."""


class _Commands(TyperGroup):
    """Imports a command when it is asked for, so that each pays at its start for nothing but what it needs."""

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        return list(COMMANDS)

    def get_command(self, ctx: typer.Context, cmd_name: str) -> TyperCommand | None:  # type: ignore[override]
        if cmd_name not in COMMANDS:
            return None
        command = typer.main.get_command(importlib.import_module(f"orchd.cli.commands.{cmd_name}").app)
        assert isinstance(command, TyperCommand)
        return command


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,  # a local may be a token
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The command line."""
    streams = StandardStreams()
    try:
        app(prog_name="orchd", obj=streams)
    except SystemExit as left:
        code = left.code
    except OutputLost:
        code = None  # see below
    except Exception:  # Python would leave with 1, which is "no"
        from orchd.cli.outcome import Exit

        sys.excepthook(*sys.exc_info())
        code = Exit.DEFECT
    if streams.lost is not None:
        from orchd.cli.outcome import output_lost

        code = output_lost(streams.lost)
    streams.close()
    sys.exit(code)


def _show_version(wanted: bool) -> None:
    if wanted:
        from orchd.cli.versions import engine_versions

        print(f"orchd {__version__}")
        print("\n".join(engine_versions()))
        print(f"Python {platform.python_version()}")
        raise typer.Exit


@app.callback(
    epilog=examples(
        "orchd serve                          [dim]# the demo model[/]",
        "orchd run 'Name three rivers.'       [dim]# from another shell[/]",
    )
)
def _orchd(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show versions and exit.")
    ] = False,
) -> None:
    """An inference server for GGUF models that owns its GPUs in-process."""
