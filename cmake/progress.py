"""Shows a build's log as one line that is redrawn, with count and time left; in a pipe, a line for each tenth.

Reads the log from stdin, with ninja's status as ``[done/total seconds s]``. Errors are shown as they are.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from typing import TextIO

STATUS = re.compile(r"\s*\[(\d+)/(\d+) ([\d.]+) s\]")
ERROR = re.compile(r"[Ee]rror: |ERROR|CMake Error")


def show(log: Iterable[str], out: TextIO) -> None:
    """Show a log until it ends."""
    live, tenth, drawn = out.isatty(), 0, False
    for line in log:
        if status := STATUS.match(line):
            done, total, seconds = int(status[1]), int(status[2]), float(status[3])
            text = f"  {done} of {total} steps, {_left(done, total, seconds)}"
            if live:
                out.write(f"\r\x1b[K{text}")
                drawn = True
            elif done * 10 // total > tenth:
                tenth = done * 10 // total
                out.write(f"{text}\n")
        elif ERROR.search(line):
            out.write(("\n" if drawn else "") + line)
            drawn = False
        out.flush()
    if drawn:
        out.write("\n")


def _left(done: int, total: int, seconds: float) -> str:
    """In words, as if all steps took as long as those that are done."""
    if done == total:
        return f"done in {_time(seconds)}"
    return f"about {_time(seconds / done * (total - done))} left" if done else "starting"


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


if __name__ == "__main__":
    show(sys.stdin, sys.stdout)
