"""`orchd check`: explains a configuration; starts nothing."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import typer

from orchd.cli.check import Checkup
from orchd.cli.command import WithModel, examples, new_app
from orchd.cli.console import console_for
from orchd.cli.options import (
    ConfigOption,
    CtxOption,
    DeviceOption,
    JsonOption,
    ModelOption,
    SlotsOption,
    TokenFileOption,
    pool_flags,
)
from orchd.cli.outcome import Exit, finish
from orchd.cli.report import show
from orchd.cli.terminal import print_json, status
from orchd.settings.config import Config
from orchd.settings.sources import load, working_folder

app = new_app()


@app.command(
    cls=WithModel,
    epilog=examples(
        "orchd check",
        "orchd check -m models/qwen.gguf --slots 8 --ctx 8192   [dim]# would this fit?[/]",
        "orchd check -c orchd.toml --json | jq .problems",
    ),
)
def check(
    config: ConfigOption = None,
    token_file: TokenFileOption = None,
    model: ModelOption = None,
    device: DeviceOption = None,
    slots: SlotsOption = None,
    ctx: CtxOption = None,
    as_json: JsonOption = False,
) -> None:
    """Explain the configuration: devices, models, memory. Starts nothing.

    Exit code 0: 'orchd serve' can start with it. 1: a device or model cannot be used, or something does not fit.
    2: the configuration itself is wrong.
    """

    async def command() -> Exit:
        flags = pool_flags(model, device, slots, ctx)
        settings = load(config_path=config, flags=flags, environ=os.environ, cwd=working_folder())
        return _check(settings, token_file=token_file, as_json=as_json)

    raise typer.Exit(finish(command))


def _check(config: Config, *, token_file: Path | None, as_json: bool) -> Exit:
    with status("checking devices and models"):
        report = Checkup(config, os.environ, token_file=token_file).run()
    if as_json:
        print_json(report)
    else:
        show(report, console_for(sys.stdout))
    return Exit.OK if report.ok else Exit.FAILED
