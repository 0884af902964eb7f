"""The commands there are; each is imported when it is asked for."""

from __future__ import annotations

import difflib
import importlib
import platform
import shlex
import sys
from typing import Annotated, Any, Final, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from orchd import __version__
from orchd.cli.command import examples, without_types
from orchd.cli.exits import complain

COMMANDS: Final = ("serve", "health", "status", "run", "chat", "reload", "models", "check", "openai")
"""In the order of the help. Each is the module of that name in `orchd.cli.commands`."""


class _Commands(TyperGroup):
    """Imports a command when it is asked for, so that each pays at its start for nothing but what it needs."""

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Typer's own; what is wrong with the arguments is one line, as every other error."""
        try:
            code = super().main(*args, **{**kwargs, "standalone_mode": False})
        except typer.TyperException as error:
            _complain(error)
            code = 2
        sys.exit(code)

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]  # the base says a private class
        """Typer's own; ``help`` and ``help run`` are ``--help`` and ``run --help``."""
        if args[:1] == ["help"]:
            args = [*args[1:2], "--help"]
        return super().parse_args(ctx, args)

    def get_params(self, ctx: typer.Context) -> Any:  # type: ignore[override]  # the base says a private class
        """Typer's own, the flags without a type."""
        return without_types(super().get_params(ctx))

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]  # the base says a private class
        return list(COMMANDS)

    def get_command(self, ctx: typer.Context, cmd_name: str) -> TyperCommand | None:  # type: ignore[override]  # the base says a private class
        if cmd_name not in COMMANDS:
            if not ctx.resilient_parsing and not cmd_name.startswith("-"):
                ctx.fail(_no_command(cmd_name))
            return None
        command = typer.main.get_command(importlib.import_module(f"orchd.cli.commands.{cmd_name}").app)
        assert isinstance(command, TyperCommand)
        return command


def _no_command(name: str) -> str:
    """What may have been meant by a word where a command should be."""
    if name.endswith(".gguf"):
        return f"there is no command {name!r}; to serve this model: orchd serve -m {shlex.quote(name)}"
    if " " in name:
        return f"there is no command {name!r}; to ask a model: orchd run {shlex.quote(name)}"
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    return f"there is no command {name!r}; " + (f"did you mean {near[0]}?" if near else f"use {', '.join(COMMANDS)}")


def _complain(error: typer.TyperException) -> None:
    """What is wrong with the arguments; nothing where help was printed instead."""
    if not (message := error.format_message().rstrip(".")):
        return
    message = message.removeprefix("Invalid value for ")
    context = getattr(error, "ctx", None)
    command = "orchd" if context is None else context.command_path
    complain(f"{message[:1].lower()}{message[1:]}; see {command} --help")


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,  # a local may be a token
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
