"""A prompt from the command line, from stdin, or from both."""

from __future__ import annotations

import os
import select
import sys
from typing import Final

from orchd.cli.outcome import complain
from orchd.errors import ConfigError

_SILENCE_S: Final = 3.0
"""After this long without a byte, a reader may wonder what is waited for."""


def prompt_with_stdin(prompt: str | None) -> str:
    """The prompt, then the text on stdin: either alone, or both with an empty line between them.

    Args:
        prompt: From the command line; without one, or with ``-``, stdin is all there is.

    Raises:
        ConfigError: There is no text, or it cannot be read.
    """
    if prompt in (None, "-"):
        if prompt is None and sys.stdin is not None and sys.stdin.isatty():
            raise ConfigError("there is no prompt; use orchd run 'PROMPT', or pipe the text in")
        text = _read()
        if not text:
            raise ConfigError("stdin is empty; pipe the text in, or use orchd run 'PROMPT'")
        return text
    assert prompt is not None
    text = "" if sys.stdin is None or sys.stdin.isatty() else _read()
    return f"{prompt}\n\n{text}" if text else prompt


def _read() -> str:
    if sys.stdin is None:
        raise ConfigError("stdin is closed, but - reads the prompt from it; pass the prompt as an argument")
    _tell_if_silent()
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


def _tell_if_silent() -> None:
    """Say what is waited for: a pipe that nobody writes to or closes looks like a server that hangs."""
    try:
        if not os.isatty(sys.stdin.fileno()) and not select.select([sys.stdin], [], [], _SILENCE_S)[0]:
            complain("reading stdin until its end; if nothing comes from there, use < /dev/null")
    except (OSError, ValueError):
        pass  # what cannot be waited for is read, and that says what is wrong
