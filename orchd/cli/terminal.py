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


class Printer:
    """A task's text as it comes: the answer on stdout, and reasoning on stderr, dim where that is a terminal."""

    def __init__(self) -> None:
        self._last = ""  # of the answer
        self._thinks = False
        err = console_for(sys.stderr)
        self._dim = ("\x1b[2m", "\x1b[22m") if err.is_terminal and not err.is_dumb_terminal else ("", "")

    def reasoning(self, text: str) -> None:
        """A piece of what the model thinks."""
        text = text.translate(_PICTURES) if sys.stderr.isatty() else text
        print(text.join(self._dim), end="", file=sys.stderr, flush=True)
        self._thinks = True

    def answer(self, text: str) -> None:
        """A piece of the answer."""
        self._end_reasoning("\n\n")
        print_piece(text)
        self._last = text

    def close(self) -> None:
        """The next line of a terminal is a new one."""
        self._end_reasoning("\n")
        if self._last and sys.stdout.isatty() and not self._last.endswith("\n"):
            print()

    def _end_reasoning(self, with_text: str) -> None:
        if self._thinks:
            print(with_text, end="", file=sys.stderr, flush=True)
            self._thinks = False


def print_json(answer: object) -> None:
    """One line."""
    print(msgspec.json.encode(answer).decode())
