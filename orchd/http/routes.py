"""The five handlers. Each turns a request into a call of the service and its answer into a response."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from typing import Any, TypeVar

import msgspec
from aiohttp import hdrs, web

from orchd.errors import Internal, InvalidParams, TaskError
from orchd.http import sse
from orchd.http.body import read_body
from orchd.metrics import CONTENT_TYPE, Metrics
from orchd.schemas import ReloadRequest, StrictWire, TaskRequest
from orchd.service import Service
from orchd.settings.strict import explain

SERVICE = web.AppKey("service", Service)
METRICS = web.AppKey("metrics", Metrics)
LARGE_BODIES = web.AppKey("large_bodies", asyncio.Lock)

_WireT = TypeVar("_WireT", bound=StrictWire)

_decode_task = msgspec.json.Decoder(TaskRequest)
_decode_reload = msgspec.json.Decoder(ReloadRequest)
_each_once = msgspec.json.Decoder(
    msgspec.defstruct(
        "TaskFields",
        [(name, msgspec.Raw | msgspec.UnsetType, msgspec.UNSET) for name in TaskRequest.__struct_fields__],
        forbid_unknown_fields=True,
    )
)
_encode = msgspec.json.Encoder().encode
LONG_FIELDS = frozenset({"prompt", "messages", "chat_template_kwargs", "json_schema"})
"""Fields of a task whose value can be larger than `LARGE_BODY_BYTES`."""
_SHORT_FIELDS = [name for name in TaskRequest.__struct_fields__ if name not in LONG_FIELDS]
_MISFIT = msgspec.Raw(b"{}")  # none of the short ones takes an object

LARGE_BODY_BYTES = 64 * 1024
"""Beyond this, a body is read with care, because decoding it keeps Python's lock, so that a thread would help nobody:

- each field is read once, however often it is there: numbers of hundreds of digits take up to 30 µs each;
- a field that is longer than this by itself, and cannot be, is not read: a list of 200,000 strings takes 16 ms;
- bodies are read one at a time, with whatever else the event loop has to do between two of them.
"""


def _json(body: object, status: int = 200) -> web.Response:
    return web.Response(body=_encode(body), status=status, content_type="application/json")


def _decode(body: bytes, decoder: msgspec.json.Decoder[_WireT]) -> _WireT:
    try:
        if len(body) > LARGE_BODY_BYTES and decoder is _decode_task:
            with contextlib.suppress(RecursionError):  # the decoder proper says where
                body = _encode(_without_misfits(_each_once.decode(body)))
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise explain(error, decoder.type) from None


def _without_misfits(fields: Any) -> object:
    """Fields of a task as they were sent; in place of each that is far too long, what its decoder rejects."""
    for name in _SHORT_FIELDS:
        sent = getattr(fields, name)
        if sent is not msgspec.UNSET and len(sent) > LARGE_BODY_BYTES:
            setattr(fields, name, _MISFIT)
    return fields


async def _read_task(request: web.Request) -> TaskRequest:
    body = await read_body(request)
    if len(body) <= LARGE_BODY_BYTES:
        return _decode(body, _decode_task)
    async with request.app[LARGE_BODIES]:
        await asyncio.sleep(0)  # others have their turn, and find the lock taken
        return _decode(body, _decode_task)


async def submit(request: web.Request) -> web.Response:
    """``POST /v1/tasks``."""
    service = request.app[SERVICE]
    wanted = None
    try:
        wanted = await _read_task(request)
        return _json(await service.submit(wanted), 202)
    except TaskError as error:
        service.note_refusal(error, wanted)
        raise
    except ConnectionError:
        raise  # the client is gone: it was not refused
    except Exception as error:
        service.note_refusal(Internal(f"{type(error).__name__}; the log has its traceback"), wanted)
        raise


def _task_id(request: web.Request) -> str:
    """The task's id as the 202 spelled it, however the client spells its UUID."""
    asked = request.match_info["id"]
    try:
        return str(uuid.UUID(asked))
    except ValueError:
        return asked


def _grace_s(asked: str | None) -> float | None:
    """Seconds that a listener grants its task. Raises `InvalidParams`, because a task would run on that should not."""
    try:
        grace_s = None if asked is None else float(asked)
    except ValueError:
        grace_s = -1.0
    if grace_s is not None and not 0 <= grace_s < float("inf"):
        raise InvalidParams("cancel_grace_s: expected a number of seconds, from 0 on")
    return grace_s


async def stream(request: web.Request) -> web.StreamResponse:
    """``GET /v1/tasks/{id}/stream``."""
    last = request.headers.get("Last-Event-ID", request.query.get("last_event_id"))
    start = sse.resume_from(last)
    grace_s = _grace_s(request.query.get("cancel_grace_s"))
    with request.app[SERVICE].follow(_task_id(request), grace_s=grace_s) as task:
        if task.log.ended and start >= len(task.log.frames):
            return web.Response(status=204)  # tells EventSource not to come back
        response = web.StreamResponse(headers=sse.HEADERS)
        await response.prepare(request)
        await sse.send(request, response, task, start)
        return response


async def reload(request: web.Request) -> web.Response:
    """``POST /v1/pools/{id}/reload``."""
    body = await read_body(request)
    wanted = _decode(body, _decode_reload) if body.strip() else ReloadRequest()
    return _json(await request.app[SERVICE].reload(request.match_info["id"], wanted.new_model_ref))


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
