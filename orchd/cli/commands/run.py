"""`orchd run`: asks a model and streams its answer to stdout."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from orchd.cli.ask import ask
from orchd.cli.command import Command, examples, new_app
from orchd.cli.exits import Exit
from orchd.cli.options import ConfigOption, TokenFileOption, UrlOption
from orchd.cli.outcome import finish
from orchd.cli.schema_option import read_schema
from orchd.cli.stdin import prompt_with_stdin
from orchd.cli.target import find_target
from orchd.cli.task_options import task_options, wait_seconds
from orchd.cli.words import of_run
from orchd.schemas import Message

app = new_app()


class _Run(Command):
    def about_extra(self, extra: Sequence[str], params: dict[str, Any]) -> str:
        """Quotes were forgotten."""
        prompt = " ".join([str(params["prompt"]), *extra])
        return f"the prompt is several arguments; put it in quotes: orchd run {shlex.quote(prompt)}"


@app.command(
    cls=_Run,
    epilog=examples(
        "orchd run 'Name three rivers.'",
        "orchd run 'Summarise this text.' < notes.txt",
        "git diff | orchd run --system 'Write a commit message for this diff.'",
        "orchd run --raw --temperature 0 'Once upon a time'",
        "orchd run --template-arg enable_thinking=false 'Name three rivers.'",
        "orchd run --reasoning --max-tokens 2000 'Name three rivers.' > answer.txt",
        "orchd run --priority batch --wait 60 --json 'Name three rivers.' | jq -r .text",
    ),
)
def run(
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT",
            help="What to ask. Text on stdin follows it, or is the whole prompt if PROMPT is omitted or is -.",
            show_default=False,
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message, put before the prompt.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text; no chat template.")] = False,
    template_arg: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Variable for the model's chat template; may be repeated."),
    ] = None,
    reasoning: Annotated[
        bool, typer.Option("--reasoning", help="Show what the model thinks before it answers, on stderr.")
    ] = False,
    pool: Annotated[str | None, typer.Option(metavar="POOL", help="Pool; required if the server has several.")] = None,
    model_ref: Annotated[str | None, typer.Option(metavar="MODEL", help="Only this model may answer.")] = None,
    priority: Annotated[
        str | None,
        typer.Option(metavar="interactive|batch", help="Interactive tasks start before all batch tasks."),
    ] = None,
    max_tokens: Annotated[
        str | None, typer.Option(metavar="N", help="Maximum number of output tokens. [dim]Default: 256[/]")
    ] = None,
    seed: Annotated[str | None, typer.Option(metavar="N", help="Same seed, same answer.")] = None,
    temperature: Annotated[
        str | None, typer.Option(metavar="T", help="0 picks the most likely token. [dim]Default: 0.8[/]")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Stop before this text; may be repeated.")
    ] = None,
    json_schema: Annotated[
        str | None, typer.Option(metavar="FILE|JSON", help="Answer with JSON for this schema; true: any object.")
    ] = None,
    wait: Annotated[str, typer.Option(metavar="SECONDS", help="How long to wait for room in a full queue.")] = "0",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")] = False,
    url: UrlOption = None,
    config: ConfigOption = None,
    token_file: TokenFileOption = None,
) -> None:
    """Ask a model and stream its answer to stdout.

    While the task waits, a terminal shows when its turn comes. Ctrl-C cancels the task on the server too.

    Exit code 0: answered. 1: refused, or the task failed. 2: not reachable, or the token was rejected.
    """

    async def command() -> Exit:
        options = task_options(
            pool=pool,
            template_arg=template_arg,
            model_ref=model_ref,
            priority=priority,
            max_tokens=max_tokens,
            seed=seed,
            temperature=temperature,
            stop=stop or None,
            reasoning=reasoning or None,
            json_schema=None if json_schema is None else read_schema(json_schema),
        )
        max_wait_s = wait_seconds(wait)
        target = find_target(url, config, token_file)
        text = prompt_with_stdin(prompt)
        return await ask(
            target,
            prompt=text if raw else None,
            messages=None if raw else _conversation(system, text),
            options=options,
            max_wait_s=max_wait_s,
            as_json=as_json,
        )

    if raw and system is not None:
        raise typer.BadParameter("needs the chat template, which --raw skips", param_hint="--system")
    if raw and template_arg:
        raise typer.BadParameter("needs the chat template, which --raw skips", param_hint="--template-arg")
    if raw and reasoning:
        raise typer.BadParameter("needs the chat template, which --raw skips", param_hint="--reasoning")
    raise typer.Exit(finish(command, words=of_run))


def _conversation(system: str | None, text: str) -> list[Message]:
    before = [] if system is None else [Message(role="system", content=system)]
    return [*before, Message(role="user", content=text.removesuffix("\n"))]
