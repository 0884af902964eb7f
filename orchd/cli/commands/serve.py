"""`orchd serve`: serves models until Ctrl-C."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Annotated

import typer

from orchd.cli.command import WithModel, examples, new_app
from orchd.cli.console import ServeConsole, set_up_logging
from orchd.cli.exits import Exit, complain
from orchd.cli.options import ServerOptions, with_server_options
from orchd.cli.streams import StandardStreams
from orchd.errors import ConfigError
from orchd.observer import Observer
from orchd.settings.config import Config
from orchd.settings.credentials import Credentials, find_or_create_token
from orchd.settings.sources import load, working_folder

app = new_app()


@app.command(
    cls=WithModel,
    epilog=examples(
        "orchd serve",
        "orchd serve -m models/qwen.gguf --slots 8 --ctx 8192",
        "orchd serve -m models/qwen.gguf --device gpu:0 --device gpu:1",
        "orchd serve --models-dir ~/models    [dim]# and what a reload may ask for[/]",
        "orchd serve -c orchd.toml --port 9000",
    ),
)
@with_server_options
def serve(
    options: ServerOptions,
    context: typer.Context,
    verbose: Annotated[
        int,
        typer.Option(
            "--verbose", "-v", count=True, show_default=False, help="Log every decision; -vv: llama.cpp's log too."
        ),
    ] = 0,
) -> None:
    """Serve models until Ctrl-C.

    On Ctrl-C, running tasks may finish; a second Ctrl-C quits at once. The first start creates a
    token and prints where it is stored.
    """
    if (streams := context.find_object(StandardStreams)) is not None:
        streams.write_aside()
    console = ServeConsole()
    set_up_logging(console.err, verbosity=verbose)
    try:
        settings = load(config_path=options.config, flags=options.flags, environ=os.environ, cwd=working_folder())
        credentials = find_or_create_token(settings, token_file_flag=options.token_file, environ=os.environ)
        code = _serve(settings, credentials, console, last_words=None if streams is None else streams.close)
    except ConfigError as error:
        console.close()
        complain(error)
        code = Exit.NO_ANSWER
    finally:
        console.close()
    raise typer.Exit(code)


def _serve(
    config: Config, credentials: Credentials, observer: Observer, *, last_words: Callable[[], object] | None
) -> int:
    """Imports the server only now: it loads llama.cpp, and a wrong configuration is told without it."""
    try:
        from orchd import serve as process
    except (ImportError, OSError, RuntimeError) as error:
        raise ConfigError(f"llama.cpp cannot be loaded ({error}); run 'make setup' again") from error
    return process.serve(config, credentials, observer=observer, last_words=last_words)
