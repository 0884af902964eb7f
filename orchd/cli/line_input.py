"""Messages of one or several lines, typed at a terminal or from a pipe."""

from __future__ import annotations

import contextlib
import sys
from typing import Final

with contextlib.suppress(ImportError):  # some builds of Python have none
    import readline  # noqa: F401  # `input` edits lines with it and remembers them, until the process ends

_QUOTES: Final = '"""'


def read_message() -> str:
    '''The next message: a line; lines that end in a backslash and the one after them; or all between two """.

    Raises:
        EOFError: There is nothing more.
        KeyboardInterrupt: Ctrl-C.
        UnicodeDecodeError: It is not text.
    '''
    line = _line("> ")
    if not line.lstrip().startswith(_QUOTES):
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1].removesuffix("\\")
            lines.append(_line(". "))
        return "\n".join(lines)
    lines = [line.lstrip().removeprefix(_QUOTES)]
    while _QUOTES not in lines[-1]:
        lines.append(_line(". "))
    lines[-1] = lines[-1].partition(_QUOTES)[0]
    return "\n".join(lines).strip("\n")


def _line(prompt: str) -> str:
    if sys.stdin is None:
        raise EOFError
    if sys.stdin.isatty() and sys.stdout.isatty():
        return input(prompt)
    if sys.stdin.isatty():
        print(prompt, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n")
