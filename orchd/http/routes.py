"""The five handlers. Each turns a request into a call of the service and its answer into a response."""

from __future__ import annotations

import asyncio

import msgspec
from aiohttp import hdrs, web

from orchd.errors import InvalidParams, TaskError
from orchd.http import sse
from orchd.metrics import CONTENT_TYPE, Metrics
from orchd.schemas import ReloadRequest, TaskRequest
from orchd.service import Service

SERVICE = web.AppKey("service", Service)
METRICS = web.AppKey("metrics", Metrics)

_decode_task = msgspec.json.Decoder(TaskRequest).decode
_decode_reload = msgspec.json.Decoder(ReloadRequest).decode
_encode = msgspec.json.Encoder().encode


def _json(body: object, status: int = 200) -> web.Response:
    return web.Response(body=_encode(body), status=status, content_type="application/json")


def explain(error: Exception) -> InvalidParams:
    """A sentence from what msgspec says of a body."""
    if isinstance(error, msgspec.ValidationError):
        message, _, path = str(error).partition(" - at ")
        field = path.strip("`").removeprefix("$").lstrip(".")
        message = message[0].lower() + message[1:]
        return InvalidParams(f"{field}: {message}" if field else message)
    if isinstance(error, UnicodeDecodeError):
        return InvalidParams("the body is not UTF-8")
    return InvalidParams(f"the body is not JSON: {error}")


async def submit(request: web.Request) -> web.Response:
    """``POST /v1/tasks``."""
    service = request.app[SERVICE]
    try:
        service.check_room()
        body = await request.read()
        try:
            wanted = _decode_task(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise explain(error) from None
        return _json(await service.submit(wanted), 202)
    except TaskError as error:
        service.count_rejection(error)
        raise
    except web.HTTPRequestEntityTooLarge:
        service.count_rejection(InvalidParams("too large"))
        raise


async def stream(request: web.Request) -> web.StreamResponse:
    """``GET /v1/tasks/{id}/stream``."""
    last = request.headers.get("Last-Event-ID", request.query.get("last_event_id"))
    start = sse.resume_from(last)
    with request.app[SERVICE].follow(request.match_info["id"]) as task:
        if task.log.ended and start >= len(task.log.frames):
            return web.Response(status=204)  # tells EventSource not to come back
        response = web.StreamResponse(headers=sse.HEADERS)
        await response.prepare(request)
        await sse.send(response, task.log, start)
        return response


async def reload(request: web.Request) -> web.Response:
    """``POST /v1/pools/{id}/reload``."""
    body = await request.read()
    try:
        wanted = _decode_reload(body) if body.strip() else ReloadRequest()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise explain(error) from None
    work = request.app[SERVICE].reload(request.match_info["id"], wanted.new_model_ref)
    return _json(await asyncio.shield(work))  # goes on if the client hangs up


async def health(request: web.Request) -> web.Response:
    """``GET /health``."""
    state = request.app[SERVICE].health()
    return _json(state, 200 if all(pool.ready for pool in state.pools) else 503)


async def metrics(request: web.Request) -> web.Response:
    """``GET /metrics``."""
    return web.Response(body=request.app[METRICS].render(), headers={hdrs.CONTENT_TYPE: CONTENT_TYPE})


STREAM_PATH = "/v1/tasks/{id}/stream"

ROUTES = (
    web.post("/v1/tasks", submit),
    web.get(STREAM_PATH, stream, allow_head=False),
    web.post("/v1/pools/{id}/reload", reload),
    web.get("/health", health, allow_head=False),
    web.get("/metrics", metrics, allow_head=False),
)
