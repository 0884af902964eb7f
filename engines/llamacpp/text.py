"""Tokens to text as it may be shown: whole UTF-8 characters, reasoning apart, and nothing of a stop string."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from engines.llamacpp.channels import Channel, Part, Phase, Style

_REPLY_CHARS = 4096
"""A long beginning is read in pieces: with one that is full of markers, the time for it grows with their length."""


class StopString:
    """Finds one string in a text that comes in pieces (Knuth, Morris and Pratt 1977: linear time, no look-back)."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0  # characters at the end of what was read that begin `text`
        self._border = _borders(text)

    def read(self, char: str) -> bool:
        """Whether the string is complete with this character."""
        if self.matched == len(self.text):
            self.matched = self._border[-1]
        while self.matched and char != self.text[self.matched]:
            self.matched = self._border[self.matched - 1]
        self.matched += char == self.text[self.matched]
        return self.matched == len(self.text)


def _borders(text: str) -> list[int]:
    """For each prefix, the length of its longest proper prefix that is also its suffix."""
    border = [0] * len(text)
    k = 0
    for i in range(1, len(text)):
        while k and text[i] != text[k]:
            k = border[k - 1]
        k += text[i] == text[k]
        border[i] = k
    return border


class _Run(NamedTuple):
    """Characters of one token, the index of that token, and whether it is one whose text is shown."""

    text: str
    token: int
    shown: bool


class _Runs(deque[_Run]):
    """Characters in order."""

    def take(self, count: int) -> list[_Run]:
        """The first so many characters, which are here no more."""
        taken = []
        while count:
            run = self.popleft()
            if len(run.text) > count:
                self.appendleft(run._replace(text=run.text[count:]))
                run = run._replace(text=run.text[:count])
            count -= len(run.text)
            taken.append(run)
        return taken


class OutputText:
    """The text of one sequence while it is generated.

    Args:
        stop: The answer ends before the first of these strings, which are not looked for in reasoning.
        style: How the model marks its reasoning, if it does.
        reply: What the prompt already holds of a reply in which reasoning is to be told from the answer.
    """

    def __init__(self, stop: tuple[str, ...] = (), style: Style | None = None, reply: str | None = None) -> None:
        self.stopped = False
        """Whether a stop string was found; nothing may be pushed after that."""
        self.index = -1
        """Index of the last token that any of the text returned so far is of."""
        self.reasoning = ""
        """The reasoning that the last call has made certain."""
        self.reasoning_index = -1
        """Index of the last token that any of the reasoning so far is of."""
        self._token = -1  # index of the last one
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = [StopString(text) for text in stop]
        self._held = _Runs()  # may yet become a stop string
        self._held_chars = 0
        self._undecided = _Runs()  # may yet become a marker
        self._style = style
        self._channels = None if style is None or reply is None else style.open()
        if self._channels is not None and reply:
            parts = [self._channels.read(reply[at : at + _REPLY_CHARS]) for at in range(0, len(reply), _REPLY_CHARS)]
            known = sum(count for part in parts for _, count in part)
            self._undecided.append(_Run(reply[known:], -1, shown=False))

    @property
    def phase(self) -> Phase:
        """Whether reasoning or the answer comes next."""
        return Phase.ANSWER if self._channels is None else self._channels.phase

    def push(self, data: bytes, *, shown: bool = True, marks: bool = True) -> str:
        """Add a token; returns what may be shown now of the answer.

        Args:
            data: Its bytes.
            shown: Whether they are shown. Stop strings and markers are found in those that are not, too.
            marks: Whether they may be part of a marker where markers are tokens.
        """
        self._token += 1
        self.reasoning = ""
        return self._read(self._decoder.decode(data), shown=shown, marks=marks)

    def flush(self) -> str:
        """End of the output: all that was held back, half a character as U+FFFD; nothing once it has stopped."""
        self.reasoning = ""
        if self.stopped:
            return ""
        text = self._read(self._decoder.decode(b"", True), shown=True, marks=False)
        if self._channels is not None and not self.stopped:
            text += self._sort(self._channels.flush())
        if not self.stopped:
            text += self._show(self._held)
            self._held.clear()
        return text

    def _read(self, text: str, *, shown: bool, marks: bool) -> str:
        if self._channels is None and not self._stops:  # most sequences
            return self._show((_Run(text, self._token, shown),))
        run = _Run(text, self._token, shown)
        if self._channels is None or self._style is None:
            return self._show(self._release([run]))
        self._undecided.append(run)
        return self._sort(self._channels.read(text if marks else self._style.without_markers(text)))

    def _sort(self, parts: Iterable[Part]) -> str:
        """Put aside what is reasoning; returns what may be shown of the answer."""
        answer = ""
        for channel, count in parts:
            runs = self._undecided.take(count)
            if channel is Channel.ANSWER and not self.stopped:
                answer += self._show(self._release(runs))
            elif channel is Channel.REASONING and not self.stopped:
                shown = [run for run in runs if run.shown]
                self.reasoning += "".join(run.text for run in shown)
                self.reasoning_index = shown[-1].token if shown else self.reasoning_index
        return answer

    def _show(self, runs: Iterable[_Run]) -> str:
        text = ""
        for run in runs:
            if run.shown and run.text:
                text += run.text
                self.index = run.token
        return text

    def _release(self, runs: list[_Run]) -> list[_Run]:
        """What of the answer cannot become a stop string any more."""
        if not self._stops:
            return runs
        self._held.extend(runs)
        for char in "".join(run.text for run in runs):
            self._held_chars += 1
            complete = [stop for stop in self._stops if stop.read(char)]  # every one must read every character
            if complete:
                self.stopped = True
                return self._held.take(self._held_chars - max(len(stop.text) for stop in complete))
        keep = max(stop.matched for stop in self._stops)
        released = self._held.take(self._held_chars - keep)
        self._held_chars = keep
        return released
