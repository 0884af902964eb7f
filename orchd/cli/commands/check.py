"""`orchd check`: explains a configuration; starts nothing."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import typer

from orchd.cli.check import Checkup
from orchd.cli.command import WithModel, examples, new_app
from orchd.cli.console import console_for
from orchd.cli.exits import Exit
from orchd.cli.findings_text import show
from orchd.cli.options import JsonOption, ServerOptions, with_server_options
from orchd.cli.outcome import finish
from orchd.cli.terminal import print_json, status
from orchd.settings.config import Config
from orchd.settings.sources import survey, working_folder

app = new_app()


@app.command(
    cls=WithModel,
    epilog=examples(
        "orchd check",
        "orchd check -m models/qwen.gguf --slots 8 --ctx 8192   [dim]# would this fit?[/]",
        "orchd check -c orchd.toml --json | jq .problems",
    ),
)
@with_server_options
def check(
    options: ServerOptions,
    as_json: JsonOption = False,
) -> None:
    """Explain the configuration: address, devices, models, memory. Starts nothing.

    Exit code 0: 'orchd serve' can start with it. 1: the address, a device or a model cannot be used, or something does
    not fit. 2: the configuration itself is wrong.
    """

    async def command() -> Exit:
        settings, mistakes = survey(
            config_path=options.config, flags=options.flags, environ=os.environ, cwd=working_folder()
        )
        return _check(settings, mistakes, token_file=options.token_file, as_json=as_json)

    raise typer.Exit(finish(command))


def _check(config: Config, mistakes: Sequence[str], *, token_file: Path | None, as_json: bool) -> Exit:
    with status("checking devices and models"):
        findings = Checkup(config, os.environ, token_file=token_file, mistakes=mistakes).run()
    if as_json:
        print_json(findings)
    else:
        show(findings, console_for(sys.stdout))
    if mistakes:
        return Exit.NO_ANSWER
    return Exit.OK if findings.ok else Exit.FAILED
