"""`orchd health`: whether the server can start tasks."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from orchd.cli.command import Command, examples, new_app
from orchd.cli.console import console_for
from orchd.cli.options import ConfigOption, JsonOption, TokenFileOption, UrlOption
from orchd.cli.outcome import Exit, complain, finish
from orchd.cli.target import Target, find_target
from orchd.cli.terminal import print_json
from orchd.client import Health, Refused, Unauthorized

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
    raise typer.Exit(finish(lambda: _health(find_target(url, config, token_file), strict=strict, as_json=as_json)))


async def _health(target: Target, *, strict: bool, as_json: bool) -> Exit:
    """Asks a server how it is; no answer is an answer too."""
    async with target.client() as client:
        try:
            answer = await client.health()
        except Unauthorized:
            raise
        except Refused as error:  # with whatever status: it did not say how it is
            complain(error)
            return Exit.NO_ANSWER
    if as_json:
        print_json(answer)
    else:
        _show(answer)
    if answer.ready and answer.status != "ok":
        complain(f"ready, but {answer.status}{_not_alive(answer)}")
    return Exit.OK if answer.ready and (answer.status == "ok" or not strict) else Exit.FAILED


def _not_alive(answer: Health) -> str:
    found = [
        f"{pool.id}/{replica.id} on {replica.device}"
        for pool in answer.pools
        for replica in pool.replicas
        if not replica.alive
    ]
    return f": not alive: {', '.join(found)}" if found else ""


def _show(answer: Health) -> None:
    out = console_for(sys.stdout)
    colour = {"ok": "green", "loading": "yellow", "degraded": "red"}[answer.status]
    table = Table("pool", "model", "replica", "device", "state", "busy", box=None, pad_edge=False)
    for pool in answer.pools:
        failed = pool.model_id is None and answer.status == "degraded"
        for replica in pool.replicas:
            state = ("ready" if pool.ready else "not ready") if replica.alive else "not alive"
            if failed:
                state = "failed to load, see the server's log"
            table.add_row(
                Text(pool.id),
                Text(pool.model_id or "-"),
                Text(replica.id),
                Text(replica.device),
                Text(state, "green" if state == "ready" else "red"),
                f"{replica.busy}/{replica.slots}",
            )
        if not pool.replicas:
            table.add_row(Text(pool.id), Text(pool.model_id or "-"), "-", "-", Text("not ready", "red"), "0/0")
    out.print(Text(answer.status, f"bold {colour}"))
    out.print(table)
