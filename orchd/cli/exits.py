"""How a command ends: its exit code, and one line about what went wrong."""

from __future__ import annotations

import enum
import sys


class Exit(enum.IntEnum):
    """What a command tells the shell."""

    OK = 0
    FAILED = 1
    NO_ANSWER = 2
    DEFECT = 70
    INTERRUPTED = 130
    BROKEN_PIPE = 141


def complain(message: object) -> None:
    """One line on stderr, whatever line breaks the message holds."""
    print(f"orchd: {' '.join(str(message).split())}", file=sys.stderr)


def output_lost(error: OSError) -> Exit:
    """What to leave with where stdout could not be written: there is no answer, so neither yes nor no."""
    if isinstance(error, ConnectionError):
        return Exit.BROKEN_PIPE  # whoever read it has left, as `head` does; no reason to complain
    complain(f"cannot write to stdout ({error.strerror}), so the answer is lost; redirect it elsewhere")
    return Exit.NO_ANSWER
