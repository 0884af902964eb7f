"""How commands are declared: help that says what a reader needs, and mistakes told in one line."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperCommand, TyperOption


class Command(TyperCommand):
    """One command. Arguments that are too many get an answer of its own: a subclass may know what was meant."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.help = flowing(self.help or "")

    def get_params(self, ctx: typer.Context) -> Any:  # type: ignore[override]  # the base says a private class
        """Typer's own, the flags without a type."""
        return without_types(super().get_params(ctx))

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]  # the base says a private class
        """Typer's own, once nothing is left over."""
        if ctx.args:
            ctx.fail(self.about_extra(ctx.args, ctx.params))
        return super().invoke(ctx)

    def about_extra(self, extra: Sequence[str], params: dict[str, Any]) -> str:
        """What to say of arguments that the command does not take."""
        return f"{extra[0]!r} is one argument too many"


class WithModel(Command):
    """A command to which ``--model`` names a model."""

    def about_extra(self, extra: Sequence[str], params: dict[str, Any]) -> str:
        """The first one was meant as the model."""
        return f"{extra[0]!r} is one argument too many; to name a model: orchd {self.name} -m {shlex.quote(extra[0])}"


def new_app() -> typer.Typer:
    """What one command is declared in."""
    return typer.Typer(
        add_completion=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"], "allow_extra_args": True},
    )


def examples(*lines: str) -> str:
    """The end of a command's help."""
    return "\n".join(["[bold]Examples[/]", *(f"  {line}" for line in lines)])


def flowing(text: str) -> str:
    """Paragraphs without line breaks, for the terminal to break."""
    return re.sub(r"(?<!\n)\n(?!\n)", " ", text)


def without_types(params: Sequence[Any]) -> Sequence[Any]:
    """The parameters; those that take no value are shown without a type."""
    for param in params:
        if isinstance(param, TyperOption) and (param.is_flag or param.count):
            param.metavar = ""
    return params
