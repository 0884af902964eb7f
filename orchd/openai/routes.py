"""The bridge's handlers: requests in OpenAI's shape to tasks, and what these write back."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeVar

import msgspec
from aiohttp import web

from orchd.client import Client
from orchd.errors import InvalidParams, TaskError
from orchd.http.body import read_body
from orchd.http.sse import HEADERS
from orchd.openai import errors
from orchd.openai.answers import Model, ModelList
from orchd.openai.models import Models, Target
from orchd.openai.replies import ChatReply, Head, Reply, TextReply
from orchd.openai.running import Run, Step, running
from orchd.openai.tasks import Job, chat_jobs, completion_jobs
from orchd.openai.wire import ChatRequest, CompletionRequest
from orchd.settings.strict import explain

_RequestT = TypeVar("_RequestT", ChatRequest, CompletionRequest)

_decode_chat = msgspec.json.Decoder(ChatRequest)
_decode_completion = msgspec.json.Decoder(CompletionRequest)
_encode = msgspec.json.Encoder().encode

LARGE_BODY_BYTES: Final = 64 * 1024
"""Beyond this, a request is not made into tasks on the event loop: schemas of tools are walked through."""

_KEEP_ALIVE: Final = b": keep-alive\n\n"
_DONE: Final = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Bridge:
    """What the handlers share.

    Attributes:
        client: Of the server.
        models: The names that it knows.
        began: When this process began, in seconds since 1970.
    """

    client: Client
    models: Models
    began: int = field(default_factory=lambda: int(time.time()))


BRIDGE = web.AppKey("bridge", Bridge)


async def chat(request: web.Request) -> web.StreamResponse:
    """``POST /v1/chat/completions``."""
    return await _answer(request, _decode_chat, chat_jobs, ChatReply)


async def completion(request: web.Request) -> web.StreamResponse:
    """``POST /v1/completions``."""
    return await _answer(request, _decode_completion, completion_jobs, TextReply)


async def models(request: web.Request) -> web.Response:
    """``GET /v1/models``."""
    bridge = request.app[BRIDGE]
    return _json(ModelList(data=tuple(Model(id=name, created=bridge.began) for name in await bridge.models.names())))


async def model(request: web.Request) -> web.Response:
    """``GET /v1/models/{model}``."""
    bridge = request.app[BRIDGE]
    name = request.match_info["model"]
    await bridge.models.find(name)
    return _json(Model(id=name, created=bridge.began))


async def not_available(request: web.Request) -> web.Response:
    """What OpenAI has and orchd has not."""
    raise InvalidParams(f"{request.path} is not available, because orchd only generates text; use /v1/chat/completions")


def _decode(body: bytes, decoder: msgspec.json.Decoder[_RequestT]) -> _RequestT:
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise explain(error, decoder.type) from None


async def _answer(
    request: web.Request,
    decoder: msgspec.json.Decoder[_RequestT],
    jobs_of: Callable[[_RequestT, Target], list[Job]],
    reply_as: Callable[[Head], Reply],
) -> web.StreamResponse:
    bridge = request.app[BRIDGE]
    body = await read_body(request)
    wanted = _decode(body, decoder)
    target = await bridge.models.find(wanted.model)
    if len(body) > LARGE_BODY_BYTES:
        jobs = await asyncio.to_thread(jobs_of, wanted, target)
    else:
        jobs = jobs_of(wanted, target)
    with_usage = wanted.stream_options is not None and bool(wanted.stream_options.include_usage)
    reply = reply_as(Head(uuid.uuid4().hex, int(time.time()), target.model, with_usage))
    async with running(bridge.client, jobs) as run:
        if wanted.stream:
            return await _stream(request, run, jobs, reply)
        steps: list[Step] = []
        async for more in run.steps():
            steps += more
        return _json(reply.whole(jobs, steps, run.usage()))


async def _stream(request: web.Request, run: Run, jobs: Sequence[Job], reply: Reply) -> web.StreamResponse:
    response = web.StreamResponse(headers=HEADERS)
    await response.prepare(request)
    await response.write(b"".join(map(_event, reply.opening(jobs))))
    try:
        async for steps in run.steps():
            await response.write(b"".join(_event(reply.chunk(step)) for step in steps) or _KEEP_ALIVE)
    except TaskError as error:
        await response.write(errors.event(error))
    else:
        await response.write(b"".join(map(_event, reply.closing(run.usage()))) + _DONE)
    await response.write_eof()
    return response


def _event(chunk: object) -> bytes:
    return b"data: %b\n\n" % _encode(chunk)


def _json(body: object) -> web.Response:
    return web.Response(body=_encode(body), content_type="application/json")


ROUTES: Final = (
    web.get("/v1/models", models, allow_head=False),
    web.get("/v1/models/{model:.+}", model, allow_head=False),
    web.post("/v1/chat/completions", chat),
    web.post("/v1/completions", completion),
    *(
        web.post(f"/v1/{path}", not_available)
        for path in ("embeddings", "images/{rest:.*}", "audio/{rest:.*}", "moderations", "responses")
    ),
)
