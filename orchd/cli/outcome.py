"""How a command ends: the exit code, and at most one line on stderr."""

from __future__ import annotations

import asyncio
import enum
import sys
from collections.abc import Callable, Coroutine
from typing import Any, Final

from orchd.client.errors import BadAnswer, Forbidden, NotReachable, Unauthorized
from orchd.errors import ConfigError, OrchdError


class Exit(enum.IntEnum):
    """What a command tells the shell."""

    OK = 0
    FAILED = 1
    NO_ANSWER = 2
    DEFECT = 70
    INTERRUPTED = 130
    BROKEN_PIPE = 141


NO_ANSWER: Final = (ConfigError, NotReachable, BadAnswer, Unauthorized, Forbidden)
"""The errors after which nothing is known about what was asked for."""

Command = Coroutine[Any, Any, Exit]


def complain(message: object) -> None:
    """One line on stderr, whatever line breaks the message holds."""
    print(f"orchd: {' '.join(str(message).split())}", file=sys.stderr)


def finish(
    command: Callable[[], Command], *, interrupted: str | None = None, words: Callable[[OrchdError], str] = str
) -> Exit:
    """Runs a command to its exit code; whatever goes wrong becomes one line on stderr.

    Args:
        command: Makes the coroutine to run; what this raises counts too.
        interrupted: What to say after Ctrl-C.
        words: What to say of an error.
    """
    return ending(lambda: asyncio.run(command()), interrupted=interrupted, words=words)


def ending(
    command: Callable[[], Exit], *, interrupted: str | None = None, words: Callable[[OrchdError], str] = str
) -> Exit:
    """The same for a command that is no coroutine."""
    try:
        return command()
    except (KeyboardInterrupt, asyncio.CancelledError):
        if interrupted is not None:
            complain(interrupted)
        return Exit.INTERRUPTED
    except UnicodeEncodeError:
        complain("an argument contains bytes that are not UTF-8; convert it, or pass the text on stdin")
        return Exit.NO_ANSWER
    except Unauthorized:
        complain("the server rejected this token; set the server's token with --token-file or ORCHD_TOKEN")
        return Exit.NO_ANSWER
    except OrchdError as error:
        complain(words(error))
        return Exit.NO_ANSWER if isinstance(error, NO_ANSWER) else Exit.FAILED


def output_lost(error: OSError) -> Exit:
    """What to leave with where stdout could not be written: there is no answer, so neither yes nor no."""
    if isinstance(error, ConnectionError):
        return Exit.BROKEN_PIPE  # whoever read it has left, as `head` does; no reason to complain
    complain(f"cannot write to stdout ({error.strerror}), so the answer is lost; redirect it elsewhere")
    return Exit.NO_ANSWER
