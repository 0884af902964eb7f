"""`orchd chat`: a conversation in the terminal."""

from __future__ import annotations

import asyncio
import sys
from typing import Annotated

import typer

from orchd.cli.chat import Chat, interruptible
from orchd.cli.command import Command, examples, new_app
from orchd.cli.conversation import Conversation
from orchd.cli.exits import Exit
from orchd.cli.options import ConfigOption, TokenFileOption, UrlOption
from orchd.cli.outcome import ending
from orchd.cli.target import find_target
from orchd.cli.task_options import task_options, wait_seconds
from orchd.client import Client, PoolHealth
from orchd.errors import ConfigError

app = new_app()

_MOST_TOKENS = 1024


@app.command(
    cls=Command,
    epilog=examples(
        "orchd chat",
        "orchd chat --system 'Answer in French.' --temperature 0",
        "orchd chat < questions.txt   [dim]# one line, one message[/]",
    ),
)
def chat(
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message.")] = None,
    template_arg: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Variable for the model's chat template; may be repeated."),
    ] = None,
    pool: Annotated[str | None, typer.Option(metavar="POOL", help="Pool; required if the server has several.")] = None,
    max_tokens: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            help="Maximum number of tokens in an answer. [dim]Default: 1024, or a quarter of the context[/]",
        ),
    ] = None,
    seed: Annotated[str | None, typer.Option(metavar="N", help="Same seed, same answers.")] = None,
    temperature: Annotated[
        str | None, typer.Option(metavar="T", help="0 picks the most likely token. [dim]Default: 0.8[/]")
    ] = None,
    wait: Annotated[str, typer.Option(metavar="SECONDS", help="How long to wait for room in a full queue.")] = "60",
    url: UrlOption = None,
    config: ConfigOption = None,
    token_file: TokenFileOption = None,
) -> None:
    """Have a conversation with a model.

    Ctrl-C stops an answer and keeps what is there; Ctrl-D leaves. /help lists the other commands: another answer,
    another system message, messages of several lines.

    Exit code 0: left. 1: a message from a pipe got no answer. 2: not reachable, or the token was rejected.
    """

    def command() -> Exit:
        options = task_options(
            pool=pool, template_arg=template_arg, max_tokens=max_tokens, seed=seed, temperature=temperature
        )
        max_wait_s = wait_seconds(wait)
        client = find_target(url, config, token_file).client()
        loop = asyncio.new_event_loop()
        try:
            loop.run_until_complete(client.__aenter__())
            served = interruptible(loop, _served(client, pool))
            options["pool_id"] = served.id
            if max_tokens is None:
                options["max_tokens"] = min(_MOST_TOKENS, max(1, served.ctx // 4))
            if sys.stdin is not None and sys.stdin.isatty():
                print(f"{served.model_id or 'no model yet'}; /help for help, Ctrl-D leaves", file=sys.stderr)
            return Chat(client, loop, Conversation(system), options=options, max_wait_s=max_wait_s).run()
        finally:
            loop.run_until_complete(client.__aexit__(None, None, None))
            loop.close()

    raise typer.Exit(ending(command))


async def _served(client: Client, pool_id: str | None) -> PoolHealth:
    """The pool to talk to. Raises `ConfigError` if there is none of that name, or several and no name."""
    pools = {pool.id: pool for pool in (await client.health()).pools}
    known = ", ".join(pools)
    if pool_id is None and len(pools) > 1:
        raise ConfigError(f"--pool is required, because there are several pools; available: {known}")
    if pool_id is not None and pool_id not in pools:
        raise ConfigError(f"--pool: there is no pool {pool_id!r}; available: {known}")
    return next(iter(pools.values())) if pool_id is None else pools[pool_id]
