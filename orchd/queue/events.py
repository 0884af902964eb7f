"""A task's events as they are kept and sent: Server-Sent Events, framed once for all listeners."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Callable, Iterator

import msgspec

from orchd.schemas import End, Reasoning, Started, Token

Event = Started | Token | Reasoning | End

_NAMES: dict[type[Event], bytes] = {
    Started: b"started",
    Token: b"token",
    Reasoning: b"token",
    End: b"end",
}
_encode = msgspec.json.Encoder().encode


_FRAME_BYTES = sys.getsizeof(b"") + 16
"""What a frame takes besides its bytes: its object, its place in the list, and what allocations are rounded up by."""


def frame(event_id: int, event: Event) -> bytes:
    """One event in the wire format of the WHATWG HTML standard, section 9.2."""
    return b"id: %d\nevent: %b\ndata: %b\n\n" % (event_id, _NAMES[type(event)], _encode(event))


class EventLog:
    """Everything that happened to a task, from event 0 on; listeners read it at their own pace, late or again.

    Event loop thread only.

    Attributes:
        frames: One for each event, ready to be sent.
        size_bytes: What all of them take in memory.
        ended: Whether the last one is the task's end.
        listeners: How many follow the task; kept by `orchd.queue.tasks.TaskStore`.
    """

    __slots__ = ("_subscribers", "_will_tell", "ended", "frames", "listeners", "size_bytes")

    def __init__(self) -> None:
        self.frames: list[bytes] = []
        self.size_bytes = 0
        self.ended = False
        self.listeners = 0
        self._subscribers: list[Callable[[], None]] = []
        self._will_tell = False

    def append(self, event: Event) -> None:
        """Add an event; nothing may follow an `End`. Subscribers are told once for all that one callback adds."""
        if self.ended:
            raise RuntimeError("an event after the end of its task")
        data = frame(len(self.frames), event)
        self.frames.append(data)
        self.size_bytes += len(data) + _FRAME_BYTES
        self.ended = isinstance(event, End)
        if self._subscribers and not self._will_tell:
            self._will_tell = True
            asyncio.get_running_loop().call_soon(self._tell)

    @contextlib.contextmanager
    def subscribed(self, tell: Callable[[], None]) -> Iterator[None]:
        """Have ``tell`` called after new events, for the duration of the context."""
        self._subscribers.append(tell)
        try:
            yield
        finally:
            self._subscribers.remove(tell)

    def _tell(self) -> None:
        self._will_tell = False
        for tell in tuple(self._subscribers):
            tell()
