"""`orchd health`: whether the server can start tasks."""

from __future__ import annotations

from typing import Annotated

import typer

from orchd.cli.command import Command, examples, new_app
from orchd.cli.health import health as health_of_server
from orchd.cli.options import ConfigOption, JsonOption, TokenFileOption, UrlOption

app = new_app()


@app.command(
    cls=Command,
    epilog=examples(
        "orchd health",
        "orchd health --json | jq .status",
        "until orchd health; do sleep 1; done   [dim]# wait for the server[/]",
        "orchd health --strict > /dev/null      [dim]# is everything healthy?[/]",
    ),
)
def health(
    url: UrlOption = None,
    config: ConfigOption = None,
    token_file: TokenFileOption = None,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Exit with 1 while degraded or loading, even if every pool can start tasks."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show whether the server can start tasks.

    Exit code 0: ready, every pool can start tasks, even if degraded. 1: not ready. 2: not reachable, or refused.
    """
    raise typer.Exit(health_of_server(url, config, token_file, strict=strict, as_json=as_json))
