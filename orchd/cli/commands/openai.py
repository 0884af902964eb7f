"""`orchd openai`: speaks the OpenAI API until Ctrl-C, for a server that runs already."""

from __future__ import annotations

import os
import shlex
from typing import Annotated

import typer
from rich.text import Text

from orchd import __version__
from orchd.cli.command import Command, examples, new_app
from orchd.cli.console import ServeConsole, set_up_logging
from orchd.cli.exits import Exit, complain
from orchd.cli.options import ConfigOption, TokenFileOption, UrlOption
from orchd.cli.streams import StandardStreams
from orchd.errors import ConfigError
from orchd.openai import command
from orchd.settings.credentials import find_token
from orchd.settings.discovery import find_server
from orchd.settings.sources import load, working_folder

app = new_app()


@app.command(
    cls=Command,
    epilog=examples(
        "orchd openai",
        "orchd openai --port 9001 --url http://127.0.0.1:9000",
    ),
)
def openai(
    context: typer.Context,
    host: Annotated[str, typer.Option(metavar="HOST", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(metavar="PORT", min=0, max=65535, help="Port; 0 picks a free one.")
    ] = command.PORT,
    url: UrlOption = None,
    config: ConfigOption = None,
    token_file: TokenFileOption = None,
    verbose: Annotated[int, typer.Option("--verbose", "-v", count=True, show_default=False, help="Log more.")] = 0,
) -> None:
    """Serve the OpenAI API until Ctrl-C, for programs that know no other.

    It runs in a separate process, as a client of the server: start that with 'orchd serve'. The API key is the server's
    token. Allowed hosts and origins are those of the configuration's server section.
    """
    if (streams := context.find_object(StandardStreams)) is not None:
        streams.write_aside()
    console = ServeConsole()
    set_up_logging(console.err, verbosity=verbose)
    try:
        server_url, token = find_server(url=url, config_path=config, token_file=token_file)
        settings = load(config_path=config, flags={}, environ=os.environ, cwd=working_folder())
        origin = find_token(settings, token_file_flag=token_file, environ=os.environ).origin

        def ready(address: str) -> None:
            for line in ready_screen(address, server_url, origin):
                console.out.print(line, soft_wrap=True)
            console.out.file.flush()

        code = command.serve(server_url, settings.server, token=token, host=host, port=port, on_ready=ready)
    except ConfigError as error:
        complain(error)
        code = Exit.NO_ANSWER
    raise typer.Exit(code)


def ready_screen(address: str, server_url: str, origin: str) -> list[Text]:
    """What to do now: address, token, two lines to copy; none holds the token."""
    file = origin.removeprefix("file ") if origin.startswith("file ") else None
    key = "$ORCHD_TOKEN" if file is None else f"$(cat {shlex.quote(file)})"
    return [
        Text.assemble((f"orchd {__version__}", "bold"), " speaks the OpenAI API at ", (f"{address}/v1", "bold green")),
        Text(),
        Text.assemble(("  server  ", "dim"), server_url),
        Text.assemble(("  token   ", "dim"), f"in {origin}"),
        Text(),
        Text("Most programs read these:"),
        Text(),
        Text(f"export OPENAI_BASE_URL={address}/v1", "cyan"),
        Text(f'export OPENAI_API_KEY="{key}"', "cyan"),
        Text(),
    ]
