"""The client itself: what to say to the server, what to repeat, and when to give up."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

import msgspec

from orchd.client.errors import (
    BadAnswer,
    Busy,
    NotReady,
    Refused,
    TaskCancelled,
    TaskFailed,
)
from orchd.client.streams import Streams
from orchd.client.transport import Transport
from orchd.client.types import End, Event, Health, TaskOptions, Token
from orchd.errors import Code
from orchd.schemas import (
    Accepted,
    ErrorBody,
    Message,
    Reloaded,
    ReloadRequest,
)
from orchd.settings.discovery import find_server

if TYPE_CHECKING:
    from typing_extensions import Unpack

_SHORTEST_PAUSE_S: Final = 0.05
_LONGEST_FLOOR_S: Final = 2.0
"""Each refusal in a row doubles the shortest pause, up to this: a server that is wrong about when it has room is asked
ever less often."""


class Client:
    """Speaks to one orchd server.

    Args:
        base_url: Where the server is; left out, where this account's configuration says.
        token: The server's token; left out, the one that `orchd serve` uses on this account.
        connect_timeout_s: Limit for opening a connection.
        answer_timeout_s: Limit for an answer, and for silence on a stream (the server sends a comment at
            least every 15 s). A reload may take any time.

    Raises:
        ValueError: `base_url` is no HTTP address, or the token holds characters that no header can carry.
        ConfigError: No token is given and none is found, or the configuration is wrong.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        token: str | None = None,
        connect_timeout_s: float = 5.0,
        answer_timeout_s: float = 40.0,
    ) -> None:
        base_url, token = find_server(url=base_url, token=token)
        self._http = Transport(
            base_url, token=token, connect_timeout_s=connect_timeout_s, answer_timeout_s=answer_timeout_s
        )
        self._streams = Streams(self._http)

    async def __aenter__(self) -> Client:
        self._http.open()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._http.close()

    async def submit(
        self,
        *,
        prompt: str | None = None,
        messages: Sequence[Message | Mapping[str, str]] | None = None,
        task_id: str | None = None,
        max_wait_s: float = 0.0,
        on_wait: Callable[[Refused, float], None] | None = None,
        **options: Unpack[TaskOptions],
    ) -> Accepted:
        """Hands in a task; give exactly one of `prompt` and `messages`.

        Args:
            prompt: Raw text, without the model's chat template.
            messages: Turns of `role` and `content`, put through the model's chat template by the server.
            task_id: A UUID; made here if left out.
            max_wait_s: How long to wait, in all, for a full queue or a pool that is not ready yet. Where the server
                asks for longer, one last try is made at its end: a task may be over sooner than expected.
            on_wait: Called before each such pause with the refusal and the pause in seconds.
            options: See `TaskOptions`.

        Raises:
            Busy: The queue is still full after `max_wait_s`.
            NotReady: The pool is still not ready after `max_wait_s`.
            Refused: The server said no for another reason.
            NotReachable: No answer.
        """
        fields: dict[str, object] = {"prompt": prompt, "messages": messages, **options}
        fields["task_id"] = task_id = task_id or str(uuid.uuid4())
        body = msgspec.json.encode({name: value for name, value in fields.items() if value is not None})
        deadline = time.monotonic() + max_wait_s
        floor_s = _SHORTEST_PAUSE_S
        while True:
            try:
                reply = await self._http.exchange("POST", "/v1/tasks", body=body)
            except asyncio.CancelledError:  # it may have been accepted
                await self._streams.leave(task_id)
                raise
            if reply.status == 202:
                return self._http.decode(reply, Accepted)
            refusal = self._http.refusal(reply)
            if not isinstance(refusal, (Busy, NotReady)) or refusal.pause_s is None:
                raise refusal
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise refusal
            pause_s = min(max(refusal.pause_s, floor_s), left_s)
            floor_s = min(2 * floor_s, _LONGEST_FLOOR_S)
            if on_wait is not None:
                on_wait(refusal, pause_s)
            await asyncio.sleep(pause_s)

    def follow(
        self, task_id: str, *, last_event_id: str | None = None, on_prompt: Callable[[int, int], object] | None = None
    ) -> AsyncGenerator[Event, None]:
        """Yields the task's events up to and with its `End`, each once, over broken connections too.

        Closing the iterator cancels the task at once, unless someone else follows it. `break` out of an
        `async for` closes it soon, `contextlib.aclosing` at once.

        Args:
            task_id: From `Accepted`.
            last_event_id: Resume after this event. After the `End` there is nothing more, and nothing is
                yielded.
            on_prompt: Called while a long prompt is processed, with the tokens processed so far and all of them.

        Raises:
            NotFound: The server does not know the task, or knows it no longer.
            NotReachable: The connection broke and could not be taken up again.
        """
        return self._streams.follow(task_id, last_event_id=last_event_id, on_prompt=on_prompt)

    async def run(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message | Mapping[str, str]] | None = None,
        task_id: str | None = None,
        max_wait_s: float = 0.0,
        on_wait: Callable[[Refused, float], None] | None = None,
        on_prompt: Callable[[int, int], object] | None = None,
        **options: Unpack[TaskOptions],
    ) -> AsyncGenerator[str, None]:
        """Submits and follows: yields the answer, piece by piece; what the model thinks comes with `follow` only.

        Raises:
            TaskFailed: The task ended with an error, or (`TaskCancelled`) was cancelled.
            ClientError: As `submit` and `follow`.
        """
        accepted = await self.submit(
            prompt=prompt,
            messages=messages,
            task_id=task_id,
            max_wait_s=max_wait_s,
            on_wait=on_wait,
            **options,
        )
        async with aclosing(self.follow(accepted.task_id, on_prompt=on_prompt)) as events:
            async for event in events:
                if isinstance(event, Token):
                    yield event.text
                elif isinstance(event, End):
                    raise_if_failed(event, task_id=accepted.task_id)

    async def health(self) -> Health:
        """What the server says of itself; a server that is not ready is an answer here, not an error."""
        reply = await self._http.exchange("GET", "/health")
        ready = reply.status == 200
        if not ready:
            refusal = self._http.refusal(reply)
            if reply.status != 503 or not isinstance(refusal, BadAnswer):  # without an envelope, it is as that of a 200
                raise refusal
        return msgspec.structs.replace(self._http.decode(reply, Health), ready=ready)

    async def metrics(self) -> str:
        """``/metrics`` as it is: Prometheus's text format."""
        reply = await self._http.exchange("GET", "/metrics")
        if reply.status == 200:
            return reply.body.decode("utf-8", "replace")
        raise self._http.refusal(reply)

    async def reload(self, pool_id: str, new_model_ref: str | None = None) -> Reloaded:
        """Loads a model into a pool, by default the same reference again; takes as long as the loading takes.

        The server carries on with a reload if this call is cancelled.

        Raises:
            ReloadFailed: The new model could not be loaded; the old one still serves.
            ReloadInProgress: The pool is already being reloaded.
            Refused: The server said no for another reason.
            NotReachable: No answer; the reload may still be under way.
        """
        body = None if new_model_ref is None else msgspec.json.encode(ReloadRequest(new_model_ref=new_model_ref))
        path = f"/v1/pools/{quote(pool_id, safe='')}/reload"
        reply = await self._http.exchange("POST", path, body=body, repeatable=False, patient=True)
        if reply.status == 200:
            return self._http.decode(reply, Reloaded)
        raise self._http.refusal(reply)


def raise_if_failed(end: End, *, task_id: str) -> None:
    """Raises `TaskFailed` or `TaskCancelled` if that is how the task ended."""
    if end.finish_reason == "cancelled":
        raise TaskCancelled("the task was cancelled before it finished", task_id=task_id)
    if end.finish_reason == "error":
        error = end.error or ErrorBody(code=Code.INTERNAL, message="the server did not say why the task failed")
        raise TaskFailed(error.message, task_id=task_id, code=error.code)
