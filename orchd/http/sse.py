"""A task's events to one listener: everything new in one write, resumable, alive while nothing happens."""

from __future__ import annotations

from aiohttp import hdrs, web

from orchd.events import EventLog

KEEP_ALIVE_S = 15.0
_KEEP_ALIVE = b": keep-alive\n\n"

HEADERS = {
    hdrs.CONTENT_TYPE: "text/event-stream; charset=utf-8",
    hdrs.CACHE_CONTROL: "no-store",
    "X-Accel-Buffering": "no",
}


def resume_from(last_event_id: str | None) -> int:
    """Index of the first event to send; anything that is not one of our ids means from the start."""
    if last_event_id is None or not (last_event_id.isascii() and last_event_id.isdigit()) or len(last_event_id) > 12:
        return 0
    return int(last_event_id) + 1


async def send(response: web.StreamResponse, log: EventLog, start: int, *, keep_alive_s: float = KEEP_ALIVE_S) -> None:
    """Send events from ``start`` on until the task has ended. A slow reader holds up nobody but itself."""
    sent = min(start, len(log.frames))  # an id from the future is one we never gave
    while True:
        if sent < len(log.frames):
            frames = log.frames[sent:]
            sent += len(frames)
            await response.write(b"".join(frames))
        elif log.ended:
            return
        else:
            await log.wait(sent, timeout_s=keep_alive_s)
            if sent == len(log.frames):
                await response.write(_KEEP_ALIVE)
