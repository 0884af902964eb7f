"""`orchd run`: asks a model and streams its answer to stdout."""

from __future__ import annotations

import select
import sys
from typing import Annotated

import msgspec
import typer

from orchd.cli.ask import ask
from orchd.cli.options import ConfigOption, TokenFileOption, UrlOption, examples, new_app
from orchd.cli.outcome import Command, finish
from orchd.cli.target import find_target
from orchd.client import TaskOptions
from orchd.errors import ConfigError
from orchd.schemas import Message, Priority

app = new_app()


@app.command(
    epilog=examples(
        "orchd run 'Name three rivers.'",
        "git diff | orchd run --system 'Write a commit message for this diff.' -",
        "orchd run --raw --temperature 0 'Once upon a time'",
        "orchd run --template-arg enable_thinking=false 'Name three rivers.'",
        "orchd run --priority batch --wait 60 --json 'Name three rivers.' | jq -r .text",
    )
)
def run(
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="What to ask; - reads it from stdin.", show_default=False)
    ],
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message, put before the prompt.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text; no chat template.")] = False,
    template_arg: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Variable for the model's chat template; may be repeated."),
    ] = None,
    pool: Annotated[str | None, typer.Option(metavar="POOL", help="Pool; required if the server has several.")] = None,
    model_ref: Annotated[str | None, typer.Option(metavar="MODEL", help="Only this model may answer.")] = None,
    priority: Annotated[Priority | None, typer.Option(help="Interactive tasks start before all batch tasks.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Maximum number of output tokens. [dim]Default: 256[/]")
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Same seed, same answer.")] = None,
    temperature: Annotated[
        float | None, typer.Option(metavar="T", help="0 picks the most likely token. [dim]Default: 0.8[/]")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Stop before this text; may be repeated.")
    ] = None,
    wait: Annotated[
        float, typer.Option(metavar="SECONDS", min=0, help="How long to wait for room in a full queue.")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")] = False,
    url: UrlOption = None,
    config: ConfigOption = None,
    token_file: TokenFileOption = None,
) -> None:
    """Ask a model and stream its answer to stdout.

    Ctrl-C cancels the task on the server too.
    Exit code 0: answered. 1: refused, or the task failed. 2: not reachable, or the token was rejected.
    """
    if raw and system is not None:
        raise typer.BadParameter("needs the chat template, which --raw skips", param_hint="--system")
    if raw and template_arg:
        raise typer.BadParameter("needs the chat template, which --raw skips", param_hint="--template-arg")
    options: TaskOptions = {
        "pool_id": pool,
        "model_ref": model_ref,
        "chat_template_kwargs": dict(map(_template_argument, template_arg)) if template_arg else None,
        "priority": priority,
        "max_tokens": max_tokens,
        "seed": seed,
        "temperature": temperature,
        "stop": stop or None,
    }

    def command() -> Command:
        target = find_target(url, config, token_file)
        text = _read_stdin() if prompt == "-" else prompt
        return ask(
            target,
            prompt=text if raw else None,
            messages=None if raw else _conversation(system, text),
            options=options,
            max_wait_s=wait,
            as_json=as_json,
        )

    raise typer.Exit(finish(command))


def _read_stdin() -> str:
    if sys.stdin is None:
        raise ConfigError("stdin is closed, but - reads the prompt from it; pass the prompt as an argument")
    chunks: list[bytes] = []
    try:
        while (chunk := sys.stdin.buffer.read(1 << 16)) != b"":
            if chunk is None:  # another process has made the terminal or pipe that we share non-blocking
                select.select([sys.stdin], [], [])
            else:
                chunks.append(chunk)
        return b"".join(chunks).decode("utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the prompt from stdin ({error.strerror}); pass it as an argument") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"stdin is not UTF-8 at byte {error.start}; convert it with iconv") from None


def _template_argument(option: str) -> tuple[str, bool | int | float | str]:
    """Name and value; true, false and numbers are what they look like, anything else is text."""
    name, equals, text = option.partition("=")
    if not equals:
        raise typer.BadParameter(f"{option!r} is not NAME=VALUE", param_hint="--template-arg")
    try:
        value = msgspec.json.decode(text)
    except msgspec.DecodeError:
        return name, text
    return name, value if isinstance(value, (bool, int, float)) else text


def _conversation(system: str | None, text: str) -> list[Message]:
    before = [] if system is None else [Message(role="system", content=system)]
    return [*before, Message(role="user", content=text.removesuffix("\n"))]
