"""`orchd status`: what the server is doing, refreshed on a terminal."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from orchd import __version__
from orchd.cli.command import Command, examples, new_app
from orchd.cli.console import console_for
from orchd.cli.exits import Exit
from orchd.cli.options import ConfigOption, JsonOption, TokenFileOption, UrlOption
from orchd.cli.outcome import finish
from orchd.cli.status import Look, PoolStatus, Status, status_of
from orchd.cli.target import Target, find_target
from orchd.cli.terminal import print_json
from orchd.client import BadAnswer, Client, NotReachable

app = new_app()

PERIOD_S = 1.0
"""Between two looks, from which tokens per second come."""


@app.command(
    cls=Command,
    epilog=examples(
        "orchd status",
        "orchd status --once",
        "orchd status --json | jq '.pools[].waiting'",
    ),
)
def status(
    once: Annotated[bool, typer.Option("--once", help="Print it once, as in a pipe.")] = False,
    as_json: JsonOption = False,
    url: UrlOption = None,
    config: ConfigOption = None,
    token_file: TokenFileOption = None,
) -> None:
    """Show pools, slots, waiting tasks and tokens per second.

    On a terminal, they are refreshed every second until Ctrl-C.

    Exit code 0: shown. 2: not reachable, or the token was rejected.
    """
    live = sys.stdout.isatty() and not once and not as_json
    code = finish(lambda: _status(find_target(url, config, token_file), live=live, as_json=as_json))
    raise typer.Exit(Exit.OK if live and code == Exit.INTERRUPTED else code)


async def _status(target: Target, *, live: bool, as_json: bool) -> Exit:
    out = console_for(sys.stdout)
    async with target.client() as client:
        before = await _look(client)
        await asyncio.sleep(PERIOD_S)
        shown = status_of(target.url, before, now := await _look(client))
        if as_json:
            print_json(shown)
        elif not live or out.is_dumb_terminal:
            out.print(screen(shown))
        else:
            await _keep_showing(client, target.url, shown, now, out_of=Live(screen(shown), console=out))
    return Exit.OK


async def _keep_showing(client: Client, url: str, shown: Status, before: Look, *, out_of: Live) -> None:
    """Until it is cancelled. A server that is gone may come back."""
    with out_of as live:
        while True:
            await asyncio.sleep(PERIOD_S)
            try:
                now = await _look(client)
            except (NotReachable, BadAnswer) as error:
                live.update(Group(screen(shown), Text(str(error), "red")), refresh=True)
                continue
            shown = status_of(url, before, now)
            before = now
            live.update(screen(shown), refresh=True)


async def _look(client: Client) -> Look:
    health, metrics = await asyncio.gather(client.health(), client.metrics())
    return Look(time.monotonic(), health, metrics)


def screen(shown: Status) -> RenderableType:
    """A line about the server, and a row for each replica."""
    colour = {"ok": "green", "loading": "yellow"}.get(shown.status, "red")
    engine = "" if shown.engine_version is None else f", llama-cpp-python {shown.engine_version}"
    head = Text.assemble((shown.status, f"bold {colour}"), f"  {shown.url}  orchd {__version__}{engine}")
    table = Table(box=None, pad_edge=False)
    for name in ("pool", "model", "device"):
        table.add_column(name, overflow="ellipsis", no_wrap=True)
    gpus = any(replica.vram_used_bytes is not None for pool in shown.pools for replica in pool.replicas)
    for name in ("busy", "tokens/s", "interactive", "batch", *(("GPU", "VRAM") if gpus else ())):
        table.add_column(name, justify="right", no_wrap=True)
    for pool in shown.pools:
        for row in _rows(pool, gpus=gpus):
            table.add_row(*row)
    refused = f"\n{shown.rejected} refused since the start" if shown.rejected else ""
    return Group(head, Text(), table, Text(f"interactive, batch: waiting tasks{refused}", "dim"))


def _rows(pool: PoolStatus, *, gpus: bool) -> list[list[RenderableType]]:
    rows: list[list[RenderableType]] = []
    for replica in pool.replicas:
        state = f"{replica.busy}/{replica.slots}" if replica.alive else Text("not alive", "red")
        row: list[RenderableType] = [Text(replica.device), state, f"{replica.tokens_per_s:.1f}"]
        first = not rows
        row = [Text(pool.id if first else ""), Text((pool.model_id or "none") if first else ""), *row]
        row += [str(count) if first else "" for count in pool.waiting.values()]
        if gpus:
            used, share = replica.vram_used_bytes, replica.gpu_utilization
            row += ["" if share is None else f"{share:.0%}", "" if used is None else f"{used / 2**30:.1f} GiB"]
        rows.append(row)
    if not rows:
        waiting = [str(count) for count in pool.waiting.values()]
        return [[Text(pool.id), Text(pool.model_id or "none"), "", Text("not ready", "red"), "", *waiting]]
    return rows
