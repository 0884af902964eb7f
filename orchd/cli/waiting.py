"""What a terminal shows while a task waits: for room in the queue, then for its turn."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack

from rich.text import Text

from orchd.cli.console import console_for
from orchd.cli.words import duration, what_is_wrong
from orchd.client import Refused


class Countdown:
    """A line that says how long something will take, drawn anew for as long as it is shown.

    Args:
        what: What goes on.
        then: What comes next, such as "starts".
        seconds: When that is expected.
        late: What to say when it should have come.
        clock: Monotonic seconds.
    """

    def __init__(
        self, what: str, then: str, seconds: float, *, late: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._what, self._then, self._late, self._clock = what, then, late, clock
        self._due = clock() + seconds

    def __str__(self) -> str:
        left_s = self._due - self._clock()
        return f"{self._what}; " + (f"{self._then} in about {duration(left_s)}" if left_s > 0 else self._late)

    def __rich__(self) -> Text:
        """On one line, however narrow the terminal."""
        return Text(str(self), no_wrap=True, overflow="ellipsis")


class Waiting:
    """One line on stderr for as long as a task waits: redrawn on a terminal, once on a dumb one, nothing in a pipe."""

    def __init__(self) -> None:
        self._line = ExitStack()
        self._err = console_for(sys.stderr)

    def __enter__(self) -> Waiting:
        return self

    def __exit__(self, *_: object) -> None:
        self.over()

    def for_room(self, refusal: Refused, pause_s: float) -> None:
        """The server refused the task for now; it is sent again after the pause."""
        self._say(Countdown(what_is_wrong(refusal.message), "trying again", pause_s, late="trying again now"))

    def in_queue(self, ahead: int, predicted_start_ms: int) -> None:
        """The server took it."""
        self.over()
        if ahead or predicted_start_ms:
            what = f"waiting, {ahead} ahead" if ahead else "waiting, next in line"
            self._say(Countdown(what, "starts", predicted_start_ms / 1000, late="starts soon"))

    def for_prompt(self, tokens_read: int, tokens: int) -> None:
        """The prompt is being read."""
        if not self._err.is_dumb_terminal:
            self._say(f"reading the prompt, {100 * tokens_read // max(1, tokens)} % of {tokens} tokens")

    def over(self) -> None:
        """Takes the line away."""
        self._line.close()

    def _say(self, line: Countdown | str) -> None:
        self.over()
        if not self._err.is_terminal:
            return
        if self._err.is_dumb_terminal:
            print(line, file=sys.stderr)
        else:
            self._line.enter_context(self._err.status(line))
