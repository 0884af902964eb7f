"""A server that answers as scripted, to test what a client makes of answers. It runs in its own thread."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

TOKEN = "stand-in-token-0123456789"

Step = Callable[["StandIn", web.Request, bytes], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class Seen:
    """A request as it arrived."""

    route: str
    headers: dict[str, str]
    body: Any


@dataclass
class StandIn:
    """Gives each route its steps one after the other; the last one stays."""

    url: str = ""
    seen: list[Seen] = field(default_factory=list)
    arrived: threading.Event = field(default_factory=threading.Event)
    left: threading.Event = field(default_factory=threading.Event)
    script: dict[str, deque[Step]] = field(default_factory=lambda: defaultdict(deque))

    def on(self, route: str, *steps: Step) -> None:
        """Script a route, such as "GET /health"; any stream is "GET stream", any reload "POST reload"."""
        self.script[route].extend(steps)

    def requests(self, route: str) -> list[Seen]:
        return [seen for seen in self.seen if seen.route == route]

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        last = request.path.rsplit("/", 1)[-1]
        route = f"{request.method} {last if last in ('stream', 'reload') else request.path}"
        self.seen.append(Seen(route, dict(request.headers), json.loads(body) if body else None))
        self.arrived.set()
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return await refuse(401, "UNAUTHORIZED", "Send the token.")(self, request, body)
        steps = self.script[route]
        return await (steps.popleft() if len(steps) > 1 else steps[0])(self, request, body)


def answer(body: object, *, status: int = 200, headers: dict[str, str] | None = None) -> Step:
    async def step(_: StandIn, request: web.Request, body_in: bytes) -> web.StreamResponse:
        return web.json_response(body, status=status, headers=headers)

    return step


def refuse(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> Step:
    return answer({"code": code, "message": message, "engine": "llamacpp"}, status=status, headers=headers)


def accept(*, queue_position: int = 0, predicted_start_ms: int = 0) -> Step:
    """A 202 for the task id that was asked for."""

    async def step(_: StandIn, request: web.Request, body: bytes) -> web.StreamResponse:
        figures = {
            "queue_position": queue_position,
            "predicted_start_ms": predicted_start_ms,
            "backoff_ms": 0,
        }
        return web.json_response({"task_id": json.loads(body)["task_id"], **figures}, status=202)

    return step


def raw(body: bytes, *, status: int = 200, content_type: str = "text/html") -> Step:
    async def step(_: StandIn, request: web.Request, body_in: bytes) -> web.StreamResponse:
        return web.Response(body=body, status=status, content_type=content_type)

    return step


async def drop(_: StandIn, request: web.Request, body: bytes) -> web.StreamResponse:
    """Read the request, then cut the connection without an answer."""
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


def stream(*chunks: bytes, then: str = "close") -> Step:
    """Send chunks; then "close" the stream, "cut" the connection, or "stay" until the client leaves."""

    async def step(stand_in: StandIn, request: web.Request, body: bytes) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        transport = request.transport
        try:
            for chunk in chunks:
                await response.write(chunk)
                await asyncio.sleep(0)
            while then == "stay" and transport is not None and not transport.is_closing():
                await response.write(b": still here\n\n")
                await asyncio.sleep(0.01)
        except ConnectionError:
            pass
        if then == "stay":
            stand_in.left.set()
        elif then == "cut" and transport is not None:
            transport.close()  # after what is written, and without the last chunk
        return response

    return step


def event(number: int, kind: str, data: object) -> bytes:
    return f"id: {number}\nevent: {kind}\ndata: {json.dumps(data)}\n\n".encode()


def started(number: int = 0) -> bytes:
    return event(number, "started", {"queue_position": 0, "predicted_start_ms": 0})


def token(number: int, text: str) -> bytes:
    return event(number, "token", {"t": text, "i": number - 1})


def reasoning(number: int, text: str) -> bytes:
    return event(number, "token", {"r": text, "i": number - 1})


def end(number: int, finish_reason: str = "stop", **more: object) -> bytes:
    figures = {
        "tokens_in": 5,
        "tokens_cached": 2,
        "tokens_out": number - 1,
        "decode_ms": 12,
        "finish_reason": finish_reason,
    }
    return event(number, "end", figures | more)


def health_body(*, status: str = "ok", model_id: str = "tiny-llama") -> dict[str, object]:
    replica = {"id": "0", "device": "cpu", "alive": True, "slots": 4, "busy": 1}
    pool = {"id": "default", "model_id": model_id, "ctx": 512, "ready": status == "ok", "replicas": [replica]}
    return {"status": status, "pools": [pool]}


@contextmanager
def serving() -> Iterator[StandIn]:
    stand_in = StandIn()
    up = threading.Event()
    loop = asyncio.new_event_loop()

    async def start() -> web.AppRunner:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", stand_in.handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        stand_in.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        return runner

    def work() -> None:
        asyncio.set_event_loop(loop)
        runner = loop.run_until_complete(start())
        up.set()
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=work, name="stand-in")
    thread.start()
    try:
        assert up.wait(10)
        yield stand_in
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
