"""The streams of one server's tasks: opened, taken up again where they break, and left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import closing, suppress
from functools import partial
from typing import Final
from urllib.parse import quote

import aiohttp
import msgspec

from orchd.client.errors import ClientError, NotReachable
from orchd.client.sse import ServerEvent, SseReader
from orchd.client.transport import LOST, Transport, read, reason
from orchd.client.types import AnyToken, End, Event, Started

_RESUME_PAUSES_S: Final = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
"""Before each try to take up a stream. Together they stay below the default `tasks.cancel_grace_s`, so that a
task whose connection breaks is followed again before the server cancels it."""

_FROM_NOW_ON: Final = str(10**12 - 1)
"""As the last event's id: nothing that has happened already is sent."""

_LEAVE_S: Final = 1.0
"""How long leaving may take; whoever presses Ctrl-C waits for it."""

_DECODERS: Final[Mapping[str, msgspec.json.Decoder[Started | AnyToken | End]]] = {
    "started": msgspec.json.Decoder(Started),
    "token": msgspec.json.Decoder(AnyToken),
    "end": msgspec.json.Decoder(End),
}


class Streams:
    """Follows tasks. See `Client.follow`, which is this for its users.

    Args:
        http: The connections to the server.
    """

    def __init__(self, http: Transport) -> None:
        self._http = http

    async def follow(
        self, task_id: str, *, last_event_id: str | None, on_prompt: Callable[[int, int], object] | None
    ) -> AsyncGenerator[Event, None]:
        """The events of a task. See `Client.follow`."""
        tries, ended = 0, False
        try:
            while True:
                try:
                    response = await self._open(task_id, last_event_id)
                    if response is None:
                        return
                    with closing(response):
                        reader = SseReader(on_comment=partial(_tell_prompt, on_prompt) if on_prompt else None)
                        async for chunk in response.content.iter_any():
                            for event in self._events(reader, chunk):
                                tries, last_event_id, ended = 0, event.event_id, isinstance(event, End)
                                yield event
                                if ended:
                                    return
                    problem = "it ended before the task did"
                except LOST as error:
                    problem = reason(error)
                if tries == len(_RESUME_PAUSES_S):
                    raise NotReachable(f"the stream of task {task_id} broke and could not be resumed: {problem}")
                await asyncio.sleep(_RESUME_PAUSES_S[tries])
                tries += 1
        except (GeneratorExit, asyncio.CancelledError):
            if not ended:
                await self.leave(task_id)
            raise

    async def leave(self, task_id: str) -> None:
        """Have a task cancelled unless someone else follows it: be the last to leave, and grant it no more time.

        The grace of its own stream is for connections that break.
        """
        with suppress(ClientError, RuntimeError, *LOST):  # no answer, or the client is closed: then the grace counts
            opening = self._open(task_id, _FROM_NOW_ON, query="?cancel_grace_s=0")
            if (response := await asyncio.wait_for(opening, _LEAVE_S)) is not None:
                response.close()

    async def _open(self, task_id: str, last_event_id: str | None, *, query: str = "") -> aiohttp.ClientResponse | None:
        """The open stream, or None after the task's end. Raises `LOST` as it comes."""
        headers = {"Accept": "text/event-stream"}
        if last_event_id is not None:
            headers["Last-Event-ID"] = last_event_id
        path = f"/v1/tasks/{quote(task_id, safe='')}/stream{query}"
        response = await self._http.send("GET", path, headers=headers)
        if response.status == 200 and response.content_type == "text/event-stream":
            return response
        with closing(response):
            if response.status == 204:
                return None
            if response.status == 200:
                raise self._http.bad_answer(f"{response.content_type!r} instead of an event stream")
            raise self._http.refusal(await read(response))

    def _events(self, reader: SseReader, chunk: bytes) -> list[Event]:
        """The events that a chunk completes; types this client does not know are left out."""
        try:
            return [event for raw in reader.feed(chunk) if (event := _decode(raw)) is not None]
        except (ValueError, msgspec.DecodeError) as error:
            raise self._http.bad_answer(str(error)) from error


def _tell_prompt(on_prompt: Callable[[int, int], object], comment: str) -> None:
    """Pass on what a comment such as ``prompt 1024/6000`` says; others say nothing."""
    read, slash, total = comment.removeprefix("prompt ").partition("/")
    if comment.startswith("prompt ") and read.isdecimal() and total.isdecimal() and slash:
        on_prompt(int(read), int(total))


def _decode(raw: ServerEvent) -> Event | None:
    decoder = _DECODERS.get(raw.event)
    if decoder is None:
        return None
    data = decoder.decode(raw.data)
    return data.event(raw.id) if isinstance(data, AnyToken) else msgspec.structs.replace(data, event_id=raw.id)
