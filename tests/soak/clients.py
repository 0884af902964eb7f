"""Clients of every kind: they read fast, slowly, twice, late or not at all, hang up, come back, ask again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import struct
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp

from orchd.client.sse import ServerEvent, SseReader
from testkit.process import TOKEN
from tests.soak.ledger import Accepted, Ledger
from tests.soak.server import CTX, GOOD, GRACE_S, POOLS

PATIENCE_S = 60.0
LARGEST_BYTES = 900_000
LONGEST_PAUSE_S = 120.0
"""Of 800 tokens at the pace of a worker that hangs now and then, for all who wait and all who come back."""
BEARER = {"Authorization": f"Bearer {TOKEN}"}
WORDS = ("the", "river", "and", "some", "words", "that", "were", "there", "before", "it", "has", "been", "a", "long")
STOPS = ("the", " and", "re", "a long stop that never comes", "é", "in", ". ", "🙂")

Read = Callable[["Client", str], Awaitable[None]]


class Client:
    """Task after task of random kinds; each is read as its behaviour says, and then checked by a late reader."""

    def __init__(self, port: int, session: aiohttp.ClientSession, ledger: Ledger, chance: random.Random) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.port = port
        self.session = session
        self.ledger = ledger
        self.chance = chance

    async def largest(self) -> None:
        """The largest body there is, and nothing in it."""
        if await self._submit({}, body=b" " * LARGEST_BYTES + b"{}") is not None:
            self.ledger.complain("a task of nothing was accepted")

    async def one_task(self) -> None:
        behaviour = self.chance.choice(list(BEHAVIOURS))
        request = self._request()
        if behaviour == "answer lost":
            request.pop("model_ref", None)  # so that it is refused for good or accepted in the end, as a whole
            await self._hang_up_on(request)
        elif behaviour == "obeys":
            request.pop("model_ref", None)
        answer = await self._submit(request)
        while answer is None and behaviour in ("answer lost", "obeys") and request["max_tokens"] < CTX:
            # Of a lost answer, the first may still be under way while this one is refused.
            answer = await self._submit(request, obey=behaviour == "obeys")
        if answer is None:
            return
        task_id = answer["task_id"]
        self.ledger.tasks[task_id] = Accepted(request, behaviour)
        if behaviour == "asks again":
            await self._ask_again(request, answer)
        await BEHAVIOURS[behaviour](self, task_id)
        await asyncio.sleep(GRACE_S + 0.7)  # whoever left has been noticed by now: the check must save nobody
        await self.whole(task_id)

    def _request(self) -> dict[str, Any]:
        chance = self.chance
        text = " ".join(chance.choices(WORDS, k=chance.choice([1, 5, 20, 60, 120])))
        request: dict[str, Any] = {
            "task_id": str(uuid.UUID(int=chance.getrandbits(128), version=4)),
            "pool_id": chance.choice(POOLS),
            "priority": chance.choice(["interactive", "batch"]),
            "max_tokens": chance.choice([1, 2, 8, 30, 120, 800]),
            "temperature": chance.choice([0, 0.8, 2.0]),
        }
        if chance.random() < 0.3:
            request["messages"] = [{"role": "user", "content": text}]
        else:
            request["prompt"] = text
        if chance.random() < 0.4:
            request["stop"] = chance.sample(STOPS, chance.randint(1, 4))
        if chance.random() < 0.5:
            request["seed"] = chance.getrandbits(32)
        if chance.random() < 0.3:
            request["ignore_eos"] = True
        if chance.random() < 0.1:
            request["model_ref"] = chance.choice(GOOD)
        if chance.random() < 0.05:
            request["max_tokens"] = CTX  # never fits
        return request

    async def _submit(
        self, request: dict[str, Any], *, obey: bool = False, body: bytes | None = None
    ) -> dict[str, Any] | None:
        """The 202's body; None for a refusal, after the pause it asks for; at most a second, unless it is obeyed.

        Without obedience most that are refused never return, because the next request has another id.
        """
        data = self._padded(json.dumps(request).encode()) if body is None else body
        async with self.session.post(f"{self.url}/v1/tasks", data=data, headers=BEARER) as response:
            answer = await response.json()
            if response.status == 202:
                return dict(answer)
            self.ledger.refused[answer["code"]] += 1
            if (response.status, answer["code"]) not in REFUSALS:
                self.ledger.complain(f"a submit got {response.status} {answer}")
            pause_s = float(response.headers.get("X-Backoff-Ms", 0)) / 1000
        if pause_s > LONGEST_PAUSE_S:
            self.ledger.complain(f"a sender was told to wait for {pause_s} s")
        await asyncio.sleep(pause_s if obey else min(pause_s, 1.0))
        return None

    def _padded(self, body: bytes) -> bytes | AsyncIterator[bytes]:
        """Some bodies are large, and some come in chunks of unknown number."""
        if self.chance.random() < 0.2:
            body += b" " * self.chance.choice([20_000, 100_000, LARGEST_BYTES])
        if self.chance.random() < 0.9:
            return body

        async def chunks() -> AsyncIterator[bytes]:
            for start in range(0, len(body), 60_000):
                yield body[start : start + 60_000]

        return chunks()

    async def _hang_up_on(self, request: dict[str, Any]) -> None:
        """Send a submit and leave before its answer comes."""
        body = json.dumps(request).encode()
        head = f"POST /v1/tasks HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n"
        _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
        self.ledger.unanswered += 1
        writer.close()

    async def _ask_again(self, request: dict[str, Any], answer: dict[str, Any]) -> None:
        """The same id with the same request gets the same answer, with another one a 400."""
        if await self._submit(request) != answer:
            self.ledger.complain(f"{answer['task_id']}: asked again, another answer")
        if await self._submit(request | {"max_tokens": request["max_tokens"] + 1}) is not None:
            self.ledger.complain(f"{answer['task_id']}: another request under the same id was accepted")

    @contextlib.asynccontextmanager
    async def stream(self, task_id: str, *, last: int | None = None) -> AsyncIterator[AsyncIterator[ServerEvent]]:
        """A listener; leaving the context hangs up, half of the time with a reset."""
        headers = BEARER | ({} if last is None else {"Last-Event-ID": str(last)})
        async with self.session.get(f"{self.url}/v1/tasks/{task_id}/stream", headers=headers) as response:
            if response.status not in (200, 204):
                task = self.ledger.tasks[task_id]
                age_s = time.monotonic() - task.heard
                self.ledger.complain(
                    f"{task_id} ({task.behaviour}): its stream is {response.status} {age_s:.1f} s after its 202"
                )
            try:
                yield _events(response)
            finally:
                connection = response.connection
                if connection is not None and connection.transport is not None and self.chance.random() < 0.5:
                    _reset_on_close(connection.transport.get_extra_info("socket"))
                response.close()

    async def read(self, task_id: str, *, last: int | None = None, most: int | None = None) -> list[ServerEvent]:
        """Up to so many events, to the end without a number."""
        events: list[ServerEvent] = []
        if most == 0:
            return events
        async with self.stream(task_id, last=last) as found:
            async for event in found:
                events.append(event)
                if len(events) == most:
                    break
        return events

    async def whole(self, task_id: str) -> None:
        events = await self.read(task_id)
        self.ledger.check_stream(task_id, events)

    # --- behaviours ------------------------------------------------------------------------------------------------

    async def nothing(self, task_id: str) -> None:
        """Nobody listens before it has ended."""

    async def twice(self, task_id: str) -> None:
        one, other = await asyncio.gather(self.read(task_id), self.read(task_id))
        if one != other:
            self.ledger.complain(f"{task_id}: two listeners saw different things")

    async def late(self, task_id: str) -> None:
        await asyncio.sleep(self.chance.uniform(0, 1))
        await self.whole(task_id)

    async def hangs_up(self, task_id: str) -> None:
        self.ledger.check_stream(task_id, await self._some(task_id), whole=False)

    async def comes_back(self, task_id: str) -> None:
        """With ``Last-Event-ID`` within the grace, again and again."""
        events: list[ServerEvent] = []
        while not events or events[-1].event != "end":
            more = await self.read(task_id, last=len(events) - 1 if events else None, most=self.chance.randint(1, 12))
            events += more
            if not more:
                break
        self.ledger.check_stream(task_id, events)

    async def starts_again(self, task_id: str) -> None:
        """Without ``Last-Event-ID``."""
        seen = await self._some(task_id)
        events = await self.read(task_id)
        self.ledger.check_stream(task_id, events)
        if events[: len(seen)] != seen:
            self.ledger.complain(f"{task_id}: the second time it began with something else")

    async def crawls(self, task_id: str) -> None:
        """A byte a second, a few of them, with the smallest buffer; then it hangs up or reads the rest."""
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.port))
        reader, writer = await asyncio.open_connection(sock=sock, limit=64)
        head = f"GET /v1/tasks/{task_id}/stream HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n\r\n"
        writer.write(head.encode())
        for _ in range(self.chance.randint(1, 3)):
            await reader.read(1)
            await asyncio.sleep(1)
        if self.chance.random() < 0.5:
            sent = b""
            while not sent.endswith(b"0\r\n\r\n") and (more := await reader.read(1 << 16)):  # the last chunk
                sent += more
            if sent.count(b"event: end") != 1:
                self.ledger.complain(f"{task_id}: a slow reader saw {sent.count(b'event: end')} ends")
        else:
            _reset_on_close(sock)
        writer.close()

    async def _some(self, task_id: str) -> list[ServerEvent]:
        return await self.read(task_id, most=self.chance.choice([0, 1, 2, 5, 20]))


REFUSALS = {
    (400, "INVALID_PARAMS"),
    (429, "ADMISSION_REJECT"),
    (503, "POOL_UNAVAILABLE"),  # a model_ref that a reload has replaced
}

BEHAVIOURS: dict[str, Read] = {
    "fast": Client.whole,
    "asks again": Client.whole,
    "answer lost": Client.whole,
    "obeys": Client.whole,
    "nobody": Client.nothing,
    "twice": Client.twice,
    "late": Client.late,
    "hangs up": Client.hangs_up,
    "comes back": Client.comes_back,
    "starts again": Client.starts_again,
    "crawls": Client.crawls,
}


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[ServerEvent]:
    reader = SseReader()
    async for chunk in response.content.iter_any():
        for event in reader.feed(chunk):
            yield event


def _reset_on_close(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
