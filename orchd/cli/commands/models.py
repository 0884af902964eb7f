"""`orchd models`: what a reload may ask for."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from orchd.cli.catalog import Catalog, Entry, pool_of
from orchd.cli.command import Command, examples, new_app
from orchd.cli.console import console_for
from orchd.cli.exits import Exit
from orchd.cli.options import ConfigOption, ModelsDirOption
from orchd.cli.outcome import ending
from orchd.cli.terminal import print_json, status
from orchd.machine.memory import gib
from orchd.settings.sources import load, working_folder

app = new_app()


@app.command(
    cls=Command,
    epilog=examples(
        "orchd models",
        "orchd models --models-dir ~/models",
        "orchd models --json | jq -r '.[] | select(.fits) | .name'",
    ),
)
def models(
    pool: Annotated[
        str | None, typer.Option(metavar="POOL", help="The pool that a model should fit. [dim]Default: the first[/]")
    ] = None,
    models_dir: ModelsDirOption = None,
    config: ConfigOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
) -> None:
    """List the models that a reload may ask for, with their sizes and whether they fit.

    Reads the configuration and the files; no server is needed. Each file is opened in a separate process, which takes
    about a second.

    Exit code 0: listed. 2: the configuration is wrong.
    """
    raise typer.Exit(ending(lambda: _models(pool, models_dir, config, as_json=as_json)))


def _models(pool_id: str | None, models_dir: list[str] | None, config: Path | None, *, as_json: bool) -> Exit:
    flags = {"models.roots": models_dir or None}
    settings = load(config_path=config, flags=flags, environ=os.environ, cwd=working_folder())
    catalog = Catalog(settings, pool_of(settings, pool_id))
    entries = []
    for name in catalog.names():
        with status(f"looking at {name}"):
            entries.append(catalog.look_at(name))
    if as_json:
        print_json(entries)
    else:
        _show(entries)
    return Exit.OK


def _show(entries: list[Entry]) -> None:
    out = console_for(sys.stdout)
    table = Table(box=None, pad_edge=False)
    table.add_column("model", overflow="fold")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("needs", justify="right", no_wrap=True)
    table.add_column("verdict")
    for entry in entries:
        sizes = ["-" if size is None else gib(size) for size in (entry.size_bytes, entry.need_bytes)]
        verdict = Text("fits", "green") if entry.fits else Text(entry.problem or "does not fit now", "red")
        table.add_row(Text(entry.name), *sizes, verdict)
    out.print(table)
    if any(entry.fits is False for entry in entries):
        out.print(Text("A reload can also free the memory of the model that it replaces.", "dim"))
