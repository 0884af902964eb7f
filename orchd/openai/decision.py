"""Reads what a model writes under the schema of `orchd.openai.tools`, piece by piece, into deltas for OpenAI's clients.

Pure. However the text is cut into pieces, the same comes out: a reply's text as soon as it is certain, a call as soon
as its name is known, its arguments as they are written. A text that ends early leaves a reply or a call unfinished.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from typing import Final, Protocol

from orchd.openai.answers import Delta, FunctionDelta, ToolCallDelta

_HEAD: Final = re.compile(r'\s*\{\s*"(content|tool_calls)"\s*:\s*(?=\S)')
_CALL: Final = re.compile(r'[\s,\[}]*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\S)')

_WHOLE: Final = re.compile(
    r"""(?:
        [^\\]+
      | \\[^u]
      | \\u(?![dD][89abAB])[0-9a-fA-F]{4}
      | \\u[dD][89abAB][0-9a-fA-F]{2}                               # half of a pair, with the other half
        (?: \\u[dD][c-fC-F][0-9a-fA-F]{2} | (?=[^\\]|\\[^u]|\\u(?:[^dD]|[dD][^c-fC-F])) )   # or surely without it
    )*""",
    re.VERBOSE,
)
"""Of the inside of a JSON string, as much as can be decoded already."""


class Reader(Protocol):
    """Makes deltas of a text that comes in pieces."""

    calls: int
    """How many calls it has found."""

    def feed(self, text: str) -> list[Delta]:
        """What a piece adds."""


class PlainReader:
    """All of the text is the reply."""

    calls = 0

    def feed(self, text: str) -> list[Delta]:
        """The piece as it is."""
        return [Delta(content=text)]


class DecisionReader:
    """The text is a reply or calls, as the schema has them.

    Args:
        stop: Texts before the first of which a reply ends. What the model writes after that is left out: the server
            cannot look for them in JSON, where they may be written in other ways.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self.calls = 0
        self._stop = _Stop(stop)
        self._rest = ""
        self._value = _Value()
        self._string: _String | None = None
        self._read = self._head

    def feed(self, text: str) -> list[Delta]:
        """What a piece adds."""
        self._rest += text
        deltas: list[Delta] = []
        while self._read(deltas):
            pass
        return deltas

    def _head(self, deltas: list[Delta]) -> bool:
        """Whether this, as each of these methods, has read on to where another one follows."""
        found = self._found(_HEAD)
        if found is None:
            return False
        if found[1] == "content":
            self._string = _String() if self._rest.startswith('"') else None
            self._read = self._reply
        else:
            self._read = self._call
        return True

    def _reply(self, deltas: list[Delta]) -> bool:
        raw, self._rest = self._value.take(self._rest)
        text = raw if self._string is None else self._string.take(raw, done=self._value.done)
        if text := self._stop.take(text, done=self._value.done):
            deltas.append(Delta(content=text))
        return False

    def _call(self, deltas: list[Delta]) -> bool:
        found = self._found(_CALL)
        if found is None:
            return False
        function = FunctionDelta(name=json.loads(found[1]), arguments="")
        call = ToolCallDelta(index=self.calls, id=f"call_{secrets.token_hex(12)}", type="function", function=function)
        deltas.append(Delta(tool_calls=(call,)))
        self.calls += 1
        self._read = self._arguments
        return True

    def _arguments(self, deltas: list[Delta]) -> bool:
        raw, self._rest = self._value.take(self._rest)
        if raw:
            more = ToolCallDelta(index=self.calls - 1, function=FunctionDelta(arguments=raw))
            deltas.append(Delta(tool_calls=(more,)))
        if not self._value.done:
            return False
        self._read = self._call
        return True

    def _found(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        """What the pattern finds at the beginning of the rest, taken off it; a value begins there."""
        found = pattern.match(self._rest)
        if found is not None:
            self._rest = self._rest[found.end() :]
            self._value = _Value()
        return found


class _Value:
    """Finds the end of a JSON value."""

    def __init__(self) -> None:
        self.done = False
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def take(self, text: str) -> tuple[str, str]:
        """What of a text belongs to the value, and what comes after it."""
        if self.done:
            return "", text
        for at, char in enumerate(text):
            if self._depth == 0 and not self._in_string and char in ",]} \t\r\n":  # after a number or a word
                self.done = True
                return text[:at], text[at:]
            self._read(char)
            if self.done:
                return text[: at + 1], text[at + 1 :]
        return text, ""

    def _read(self, char: str) -> None:
        if self._escaped:
            self._escaped = False
        elif self._in_string:
            self._escaped, self._in_string = char == "\\", char != '"'
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
        else:
            return
        self.done = self._depth == 0 and not self._in_string


class _String:
    """Decodes a JSON string, quotes and all."""

    def __init__(self) -> None:
        self._begun = False
        self._pending = ""

    def take(self, raw: str, *, done: bool) -> str:
        """What more of the text is certain."""
        if raw and not self._begun:
            self._begun, raw = True, raw[1:]
        inside = self._pending + (raw[:-1] if done else raw)
        whole = _WHOLE.match(inside)
        end = len(inside) if done or whole is None else whole.end()
        self._pending = inside[end:]
        if "\\" not in inside:
            return inside
        text: str = json.loads(f'"{inside[:end]}"', strict=False)
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class _Stop:
    """Ends a text before the first of several others."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = stop
        self._held = ""
        self._over = False

    def take(self, text: str, *, done: bool) -> str:
        """What more of the text is certain to come before them."""
        if self._over or not self._stop:
            return "" if self._over else text
        text = self._held + text
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        self._over = done or bool(found)
        end = min(found) if found else len(text) if done else len(text) - self._begun(text)
        self._held = text[end:]
        return text[:end]

    def _begun(self, text: str) -> int:
        """How many characters at the end may be the beginning of one of them."""
        longest = max(map(len, self._stop)) - 1
        return next(
            (
                size
                for size in range(min(longest, len(text)), 0, -1)
                if any(stop.startswith(text[-size:]) for stop in self._stop)
            ),
            0,
        )
