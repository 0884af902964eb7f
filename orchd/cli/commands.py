"""The command line: reads options, puts the parts together, and leaves with an exit code.

0 is success, 1 "no" (not ready, a failed task or reload), 2 "cannot tell" (a wrong option or configuration, no server,
not the right token, an answer that could not be written), 70 a defect in orchd, 130 Ctrl-C, 141 whoever read the answer
has left.
"""

from __future__ import annotations

import os
import platform
import select
import sys
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from orchd import __version__
from orchd.cli import actions
from orchd.cli.actions import Exit, Target, complain, finish
from orchd.cli.console import ServeConsole, set_up_logging
from orchd.cli.openai import openai
from orchd.cli.streams import OutputLost, StandardStreams
from orchd.cli.versions import engine_versions
from orchd.client import TaskOptions
from orchd.client.discovery import find_server
from orchd.errors import ConfigError
from orchd.observer import Observer
from orchd.schemas import Message, Priority
from orchd.settings.config import Config
from orchd.settings.credentials import Credentials, find_or_create_token
from orchd.settings.sources import load, working_folder

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,  # a local may be a token
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", metavar="FILE", help="Configuration file. [dim]Default: orchd.toml[/]"),
]
TokenFileOption = Annotated[
    Path | None, typer.Option("--token-file", metavar="FILE", help="File that contains the token.")
]
UrlOption = Annotated[
    str | None,
    typer.Option("--url", metavar="URL", help="Address of the server. [dim]Default: the configured host and port[/]"),
]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", "-m", metavar="FILE", help="GGUF file. [dim]Default: a small demo model[/]"),
]
DeviceOption = Annotated[
    list[str] | None,
    typer.Option(
        "--device",
        metavar="DEVICE",
        help="gpu:N or cpu; repeat it, one for each replica. [dim]Default: every GPU, or the CPU if there is none[/]",
    ),
]
SlotsOption = Annotated[
    int | None,
    typer.Option("--slots", metavar="N", help="Tasks that run at the same time on each replica. [dim]Default: 4[/]"),
]
CtxOption = Annotated[
    int | None,
    typer.Option("--ctx", metavar="N", help="Tokens per slot, prompt and output together. [dim]Default: 4096[/]"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def main() -> None:
    """The command line."""
    streams = StandardStreams()
    try:
        app(prog_name="orchd", obj=streams)
    except SystemExit as left:
        code = left.code
    except OutputLost:
        code = None  # see below
    except Exception:  # Python would leave with 1, which is "no"
        sys.excepthook(*sys.exc_info())
        code = Exit.DEFECT
    if streams.lost is not None:
        code = actions.output_lost(streams.lost)
    streams.close()
    sys.exit(code)


def _examples(*lines: str) -> str:
    return "\n".join(["[bold]Examples[/]", *(f"  {line}" for line in lines)])


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"orchd {__version__}")
        print("\n".join(engine_versions()))
        print(f"Python {platform.python_version()}")
        raise typer.Exit


@app.callback(
    epilog=_examples(
        "orchd serve                          [dim]# the demo model[/]",
        "orchd run 'Name three rivers.'       [dim]# from another shell[/]",
    )
)
def _orchd(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show versions and exit.")
    ] = False,
) -> None:
    """An inference server for GGUF models that owns its GPUs in-process."""


@app.command(
    epilog=_examples(
        "orchd serve",
        "orchd serve -m models/qwen.gguf --slots 8 --ctx 8192",
        "orchd serve -m models/qwen.gguf --device gpu:0 --device gpu:1",
        "orchd serve -c orchd.toml --port 9000",
    )
)
def serve(
    context: typer.Context,
    config: ConfigOption = None,
    host: Annotated[
        str | None, typer.Option(metavar="HOST", help="Address to listen on. [dim]Default: 127.0.0.1[/]")
    ] = None,
    port: Annotated[
        int | None, typer.Option(metavar="PORT", help="Port; 0 picks a free one. [dim]Default: 8737[/]")
    ] = None,
    token_file: TokenFileOption = None,
    model: ModelOption = None,
    device: DeviceOption = None,
    slots: SlotsOption = None,
    ctx: CtxOption = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log every decision.")] = False,
) -> None:
    """Serve models until Ctrl-C.

    On Ctrl-C, running tasks may finish; a second Ctrl-C quits at once. The first start creates a
    token and prints where it is stored.
    """
    flags = _flags(model, device, slots, ctx) | {"server.host": host, "server.port": port}
    if (streams := context.find_object(StandardStreams)) is not None:
        streams.write_aside()
    console = ServeConsole()
    set_up_logging(console.err, verbose=verbose)
    try:
        settings = load(config_path=config, flags=flags, environ=os.environ, cwd=working_folder())
        credentials = find_or_create_token(settings, token_file_flag=token_file, environ=os.environ)
        code = _serve(settings, credentials, console)
    except ConfigError as error:
        console.close()
        complain(error)
        code = Exit.NO_ANSWER
    finally:
        console.close()
    raise typer.Exit(code)


def _serve(config: Config, credentials: Credentials, observer: Observer) -> int:
    """Imports the server only now: it loads llama.cpp, which no other command needs."""
    try:
        from orchd import server
    except (ImportError, OSError, RuntimeError) as error:
        raise ConfigError(f"llama.cpp cannot be loaded ({error}); run 'make setup' again") from error
    return server.serve(config, credentials, observer=observer)


@app.command(
    epilog=_examples(
        "orchd health",
        "orchd health --json | jq .status",
        "until orchd health; do sleep 1; done   [dim]# wait for the server[/]",
        "orchd health --strict > /dev/null      [dim]# is everything healthy?[/]",
    )
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
    raise typer.Exit(finish(lambda: actions.health(_target(url, config, token_file), strict=strict, as_json=as_json)))


@app.command(
    epilog=_examples(
        "orchd run 'Name three rivers.'",
        "git diff | orchd run --system 'Write a commit message for this diff.' -",
        "orchd run --raw --temperature 0 'Once upon a time'",
        "orchd run --template-arg enable_thinking=false 'Name three rivers.'",
        "orchd run --reasoning --max-tokens 2000 'Name three rivers.' > answer.txt",
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
    reasoning: Annotated[
        bool, typer.Option("--reasoning", help="Show what the model thinks before it answers, on stderr.")
    ] = False,
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
    if raw and reasoning:
        raise typer.BadParameter("needs the chat template, which --raw skips", param_hint="--reasoning")
    options: TaskOptions = {
        "pool_id": pool,
        "model_ref": model_ref,
        "chat_template_kwargs": dict(map(_template_argument, template_arg)) if template_arg else None,
        "reasoning": reasoning or None,
        "priority": priority,
        "max_tokens": max_tokens,
        "seed": seed,
        "temperature": temperature,
        "stop": stop or None,
    }

    def command() -> actions.Command:
        target = _target(url, config, token_file)
        text = _read_stdin() if prompt == "-" else prompt
        return actions.run(
            target,
            prompt=text if raw else None,
            messages=None if raw else _conversation(system, text),
            options=options,
            max_wait_s=wait,
            as_json=as_json,
        )

    raise typer.Exit(finish(command))


@app.command(
    epilog=_examples(
        "orchd reload default                 [dim]# the same file again[/]",
        "orchd reload default qwen2.5-0.5b    [dim]# a name inside models.roots[/]",
    )
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
            lambda: actions.reload(_target(url, config, token_file), pool, model, as_json=as_json),
            interrupted="the server continues the reload; 'orchd health' shows which model it serves",
        )
    )


@app.command(
    epilog=_examples(
        "orchd check",
        "orchd check -m models/qwen.gguf --slots 8 --ctx 8192   [dim]# would this fit?[/]",
        "orchd check -c orchd.toml --json | jq .problems",
    )
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
        flags = _flags(model, device, slots, ctx)
        settings = load(config_path=config, flags=flags, environ=os.environ, cwd=working_folder())
        return actions.check(settings, token_file=token_file, as_json=as_json)

    raise typer.Exit(finish(command))


app.command(
    "openai",
    epilog=_examples(
        "orchd openai",
        "orchd openai --port 9001 --url http://127.0.0.1:9000",
    ),
)(openai)


def _flags(model: str | None, device: list[str] | None, slots: int | None, ctx: int | None) -> dict[str, object]:
    return {"pools.model": model, "pools.devices": device or None, "pools.slots": slots, "pools.ctx": ctx}


def _target(url: str | None, config: Path | None, token_file: Path | None) -> Target:
    return Target(*find_server(url=url, config_path=config, token_file=token_file))


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
