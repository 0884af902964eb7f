"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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


def pool_flags(model: str | None, device: list[str] | None, slots: str | None, ctx: str | None) -> dict[str, object]:
    """The options of a pool, by the keys of a configuration, which knows their types and ranges."""
    return {"pools.model": model, "pools.devices": device or None, "pools.slots": slots, "pools.ctx": ctx}
