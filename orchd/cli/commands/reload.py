"""`orchd reload`: replaces a pool's model while it serves."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from orchd.cli.command import Command, examples, new_app
from orchd.cli.options import ConfigOption, JsonOption, TokenFileOption, UrlOption
from orchd.cli.outcome import Exit, finish
from orchd.cli.target import Target, find_target
from orchd.cli.terminal import print_json, status

app = new_app()


@app.command(
    cls=Command,
    epilog=examples(
        "orchd reload default                 [dim]# the same file again[/]",
        "orchd reload default qwen2.5-0.5b    [dim]# a name inside models.roots[/]",
    ),
)
def reload(
    pool: Annotated[str, typer.Argument(metavar="POOL", help="The pool.", show_default=False)],
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A model inside the server's models.roots. [dim]Default: the same model again[/]",
        ),
    ] = None,
    url: UrlOption = None,
    config: ConfigOption = None,
    token_file: TokenFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Load a model into a pool while it serves.

    Exit code 0: the new model serves. 1: the old one still serves. 2: not reachable, or the token was rejected.
    """
    raise typer.Exit(
        finish(
            lambda: _reload(find_target(url, config, token_file), pool, model, as_json=as_json),
            interrupted="the server continues the reload; 'orchd health' shows which model it serves",
        )
    )


async def _reload(target: Target, pool_id: str, new_model_ref: str | None, *, as_json: bool) -> Exit:
    """Replaces a pool's model and says what it was, what it is now and how long that took."""
    async with target.client() as client:
        before = {pool.id: pool.model_id for pool in (await client.health()).pools}
        start = time.monotonic()
        with status(f"reloading {pool_id}"):
            reloaded = await client.reload(pool_id, new_model_ref)
        seconds = time.monotonic() - start
    old, new = before.get(pool_id), reloaded.model_id
    if as_json:
        print_json({"pool_id": pool_id, "old_model_id": old, "model_id": new, "seconds": round(seconds, 3)})
    else:
        print(f"{pool_id}: {old or 'no model'} → {new} in {seconds:.1f} s")
    return Exit.OK
