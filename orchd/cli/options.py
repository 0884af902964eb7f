"""Options that several commands share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

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
HostOption = Annotated[
    str | None, typer.Option("--host", metavar="HOST", help="Address to listen on. [dim]Default: 127.0.0.1[/]")
]
PortOption = Annotated[
    str | None, typer.Option("--port", metavar="PORT", help="Port; 0 picks a free one. [dim]Default: 8737[/]")
]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", "-m", metavar="FILE", help="GGUF file, or demo. [dim]Default: a small demo model[/]"),
]
ModelsDirOption = Annotated[
    list[str] | None,
    typer.Option("--models-dir", metavar="DIR", help="Folder whose models a reload may ask for; may be repeated."),
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
    str | None,
    typer.Option("--slots", metavar="N", help="Tasks that run at the same time on each replica. [dim]Default: 4[/]"),
]
CtxOption = Annotated[
    str | None,
    typer.Option("--ctx", metavar="N", help="Tokens per slot, prompt and output together. [dim]Default: 4096[/]"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@dataclass(frozen=True)
class ServerOptions:
    """What is asked of `orchd serve`, and looked at by `orchd check`.

    Attributes:
        config: ``--config``.
        token_file: ``--token-file``.
        flags: The others, by the keys of a configuration, which knows their types and ranges; None is not given.
    """

    config: Path | None
    token_file: Path | None
    flags: dict[str, object]


def _server_options(
    config: ConfigOption = None,
    host: HostOption = None,
    port: PortOption = None,
    token_file: TokenFileOption = None,
    model: ModelOption = None,
    device: DeviceOption = None,
    slots: SlotsOption = None,
    ctx: CtxOption = None,
    models_dir: ModelsDirOption = None,
) -> ServerOptions:
    flags: dict[str, object] = {
        "server.host": host,
        "server.port": port,
        "pools.model": model,
        "pools.devices": device or None,
        "pools.slots": slots,
        "pools.ctx": ctx,
        "models.roots": models_dir or None,
    }
    return ServerOptions(config, token_file, flags)


def with_server_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command that has these options, then its own, and is called with them in place of its first parameter."""
    shared = inspect.signature(_server_options, eval_str=True).parameters
    _, *own = inspect.signature(command, eval_str=True).parameters.values()

    def call(**values: Any) -> None:
        options = _server_options(**{name: values.pop(name) for name in shared})
        command(options, **values)

    parameters = [one.replace(kind=one.KEYWORD_ONLY) for one in (*shared.values(), *own)]
    call.__name__, call.__doc__ = command.__name__, command.__doc__
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # inspect reads it
    call.__annotations__ = {one.name: one.annotation for one in parameters}
    return call
