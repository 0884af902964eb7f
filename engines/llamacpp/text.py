"""Tokens to text as it may be shown: whole UTF-8 characters, and nothing of a stop string."""

from __future__ import annotations

import codecs
from collections import deque


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


class OutputText:
    """The text of one sequence while it is generated."""

    def __init__(self, stop: tuple[str, ...] = ()) -> None:
        self.stopped = False
        """Whether a stop string was found; nothing may be pushed after that."""
        self.index = -1
        """Index of the last token that any of the text returned so far is of."""
        self._chars_in = self._chars_out = 0
        self._ends: deque[int] = deque()  # `_chars_in` after each token from `_first` on
        self._first = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = [StopString(text) for text in stop]
        self._held = ""  # may yet become a stop string

    def push(self, piece: bytes) -> str:
        """Add a token's bytes; returns what may be shown now."""
        new = self._decoder.decode(piece)
        self._chars_in += len(new)
        self._ends.append(self._chars_in)
        return self._show(self._release(new))

    def flush(self) -> str:
        """End of the output: all that was held back, half a character as U+FFFD; nothing once it has stopped."""
        if self.stopped:
            return ""
        new = self._decoder.decode(b"", True)
        if new:
            self._chars_in += len(new)
            self._ends[-1] = self._chars_in
        text = self._release(new)
        if not self.stopped:
            text, self._held = text + self._held, ""
        return self._show(text)

    def _show(self, text: str) -> str:
        if text:
            self._chars_out += len(text)
            while self._ends[0] < self._chars_out:
                self._ends.popleft()
                self._first += 1
            self.index = self._first
        return text

    def _release(self, new: str) -> str:
        if not self._stops:
            return new
        text = self._held + new
        for end, char in enumerate(new, start=len(self._held) + 1):
            complete = [stop for stop in self._stops if stop.read(char)]  # every one must read every character
            if complete:
                self.stopped, self._held = True, ""
                return text[: end - max(len(stop.text) for stop in complete)]
        cut = len(text) - max(stop.matched for stop in self._stops)
        self._held = text[cut:]
        return text[:cut]
