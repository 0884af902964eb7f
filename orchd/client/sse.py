"""Bytes of a `text/event-stream` to events, however the bytes were cut. Pure: no socket, no clock.

Follows the WHATWG rules for parsing an event stream. An event counts once its blank line has arrived, so
what a broken connection leaves half-sent is never delivered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class ServerEvent:
    """One event of the stream.

    Attributes:
        id: The last id seen up to and with this event; None before the first.
        event: Its type, ``message`` unless the stream says otherwise.
        data: Its data lines, joined by newlines.
    """

    id: str | None
    event: str
    data: str


class SseReader:
    """Feed it chunks in order; it hands back the events that each chunk completed.

    Args:
        max_event_bytes: Longest event.
        on_comment: Called with each comment's text.
    """

    def __init__(self, *, max_event_bytes: int = 1 << 20, on_comment: Callable[[str], object] | None = None) -> None:
        self._max_event_bytes = max_event_bytes
        self._on_comment = on_comment
        self._partial = b""
        self._after_cr = False
        self._first_line = True
        self._id: str | None = None
        self._event = ""
        self._data: list[str] = []
        self._event_bytes = 0

    def feed(self, chunk: bytes) -> list[ServerEvent]:
        """Takes the next chunk.

        Raises:
            ValueError: An event is longer than ``max_event_bytes``: this is no stream of events.
        """
        if self._after_cr and chunk:
            self._after_cr = False
            chunk = chunk.removeprefix(b"\n")  # the second half of a CRLF that was cut in two
        if not chunk:
            return []
        self._after_cr = chunk.endswith(b"\r")

        lines = (self._partial + chunk).splitlines(keepends=True)
        self._partial = b"" if lines[-1].endswith((b"\n", b"\r")) else lines.pop()
        events = [event for line in lines if (event := self._line(line.rstrip(b"\r\n"))) is not None]
        self._check_size(len(self._partial))
        return events

    def _line(self, line: bytes) -> ServerEvent | None:
        if self._first_line:
            self._first_line = False
            line = line.removeprefix(_BOM)
        if not line:
            return self._dispatch()

        name, _, rest = line.partition(b":")
        value = rest.removeprefix(b" ").decode("utf-8", "replace")
        if name == b"data":
            self._data.append(value)
            self._event_bytes += len(line)
            self._check_size(0)
        elif name == b"event":
            self._event = value
        elif name == b"id" and "\0" not in value:
            self._id = value
        elif not name and self._on_comment is not None:
            self._on_comment(value)
        return None  # `retry`, and fields nobody knows

    def _dispatch(self) -> ServerEvent | None:
        data, event = self._data, self._event
        self._data, self._event, self._event_bytes = [], "", 0
        return ServerEvent(self._id, event or "message", "\n".join(data)) if data else None

    def _check_size(self, pending: int) -> None:
        if self._event_bytes + pending > self._max_event_bytes:
            raise ValueError(f"an event is longer than {self._max_event_bytes} bytes")
