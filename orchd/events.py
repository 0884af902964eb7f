"""A task's events as they are kept and sent: Server-Sent Events, framed once for all listeners."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from orchd.schemas import End, Started, Token

Event = Started | Token | End

_NAMES: dict[type[Event], bytes] = {Started: b"started", Token: b"token", End: b"end"}
_encode = msgspec.json.Encoder().encode


def frame(event_id: int, event: Event) -> bytes:
    """One event in the wire format of the WHATWG HTML standard, section 9.2."""
    return b"id: %d\nevent: %b\ndata: %b\n\n" % (event_id, _NAMES[type(event)], _encode(event))


class EventLog:
    """Everything that happened to a task, from event 0 on; listeners read it at their own pace, late or again.

    Event loop thread only. A listener is anything that counts itself in with `join` and out with `leave`.
    """

    def __init__(self) -> None:
        self.frames: list[bytes] = []
        self.size_bytes = 0
        self.ended = False
        self.listeners = 0
        self._wake: list[Callable[[], None]] = []

    def append(self, event: Event) -> None:
        """Add an event and wake whoever waits. Nothing may follow an `End`."""
        if self.ended:
            raise RuntimeError("an event after the end of its task")
        data = frame(len(self.frames), event)
        self.frames.append(data)
        self.size_bytes += len(data)
        self.ended = isinstance(event, End)
        wake, self._wake = self._wake, []
        for call in wake:
            call()

    async def wait(self, seen: int, *, timeout_s: float) -> None:
        """Return when there are more than ``seen`` events, or after the time."""
        if len(self.frames) > seen:
            return
        loop = asyncio.get_running_loop()
        changed = loop.create_future()

        def wake() -> None:
            if not changed.done():
                changed.set_result(None)

        self._wake.append(wake)
        timer = loop.call_later(timeout_s, wake)
        try:
            await changed
        finally:
            timer.cancel()
            if wake in self._wake:
                self._wake.remove(wake)
