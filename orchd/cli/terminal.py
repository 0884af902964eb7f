"""What a command writes: a model's text, JSON, and a line that a terminal shows for as long as something lasts."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Final

import msgspec
from rich.text import Text

from orchd.cli.console import console_for

_PICTURES: Final = (
    {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
    | {0x7F: 0x2421}
    | dict.fromkeys(range(128, 160), 65533)
)
"""Control characters made visible: what a model writes must not be able to drive the terminal."""


def status(line: str) -> AbstractContextManager[object]:
    """A line on stderr, if that is a terminal, until the context ends."""
    err = console_for(sys.stderr)
    return err.status(Text(line)) if err.is_terminal and not err.is_dumb_terminal else nullcontext()


def print_piece(text: str) -> None:
    """A piece of a model's text, at once."""
    sys.stdout.write(text.translate(_PICTURES) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def print_json(answer: object) -> None:
    """One line."""
    print(msgspec.json.encode(answer).decode())
