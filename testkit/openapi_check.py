"""Answers against ``openapi/``: `check` judges one, `trace` judges all that an aiohttp session gets.

A path or method that the documents do not have may be answered with an error envelope, or a preflight's 204, only.
"""

from __future__ import annotations

import functools
import json
import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import yaml
from jsonschema.protocols import Validator
from openapi_schema_validator import OAS31Validator, oas31_format_checker

FOLDER = Path(__file__).parents[1] / "openapi"
DOCUMENTS = ("data.yaml", "control.yaml")

EVERYWHERE = frozenset({"content-type", "content-length", "transfer-encoding", "date", "server", "connection"})
"""Headers that any answer may have; every other one must be in its document."""
TO_PAGES = frozenset({"access-control-allow-origin", "access-control-expose-headers", "vary"})
"""Headers that an answer to a request with an allowed Origin has besides."""
PREFLIGHT = frozenset({"access-control-allow-methods", "access-control-allow-headers", "access-control-max-age"})
OUTSIDE = {400: "INVALID_PARAMS", 401: "UNAUTHORIZED", 403: "FORBIDDEN", 404: "NOT_FOUND", 405: "METHOD_NOT_ALLOWED"}
"""What a path or method that is in no document may be answered."""


class ContractError(AssertionError):
    """An answer that the documents do not allow, or a request that they do not and the server took."""


@dataclass(frozen=True)
class Operation:
    """One method of one path.

    Attributes:
        document: The file it is in.
        method: In capitals.
        path: The template, such as ``/v1/tasks/{id}/stream``.
        node: The Operation Object.
    """

    document: str
    method: str
    path: str
    node: dict[str, Any]

    def matches(self, method: str, path: str) -> bool:
        pattern = re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(self.path))
        return self.method == method and re.fullmatch(pattern, path) is not None


@functools.cache
def load(document: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((FOLDER / document).read_text(encoding="utf-8"))
    return loaded


@functools.cache
def operations() -> tuple[Operation, ...]:
    return tuple(
        Operation(document, method.upper(), path, node)
        for document in DOCUMENTS
        for path, item in load(document)["paths"].items()
        for method, node in item.items()
    )


@functools.cache
def components() -> dict[str, dict[str, Any]]:
    """The components of all documents together; what has the same name in two is the same."""
    together: dict[str, dict[str, Any]] = {}
    for document in DOCUMENTS:
        for kind, named in load(document)["components"].items():
            for name, node in named.items():
                assert together.setdefault(kind, {}).setdefault(name, node) == node, name
    return together


def resolve(node: dict[str, Any]) -> dict[str, Any]:
    """Follow a reference to where it ends."""
    while "$ref" in node:
        _, _, kind, name = node["$ref"].split("/")
        node = components()[kind][name]
    return node


def responses(operation: Operation) -> dict[int, dict[str, Any]]:
    """Each status's Response Object."""
    return {int(status): resolve(node) for status, node in operation.node["responses"].items()}


def _local(schema: Any) -> Any:
    """The schema with references into the components of all documents instead of one's."""
    if isinstance(schema, list):
        return [_local(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _local(value) for key, value in schema.items()}
    if isinstance(ref := schema.get("$ref"), str):
        made["$ref"] = f"#{ref.partition('#')[2]}"
    return made


@functools.cache
def _validator(schema: str, *, formats: bool) -> Validator:
    whole = {"allOf": [json.loads(schema)], "components": {"schemas": _local(components()["schemas"])}}
    made: Validator = OAS31Validator(whole, format_checker=oas31_format_checker if formats else None)
    return made


def validator(schema: Any, *, formats: bool = True) -> Validator:
    """A validator of a schema in one of the documents."""
    return _validator(json.dumps(_local(schema)), formats=formats)


def judge(value: Any, schema: Any, what: str, *, formats: bool = True) -> None:
    """Raise `ContractError` unless the value fits the schema."""
    complaints = [
        f"{error.json_path}: {error.message}" for error in validator(schema, formats=formats).iter_errors(value)
    ]
    if complaints:
        raise ContractError(f"{what}: {'; '.join(complaints)} (got {value!r:.300})")


# --- one answer ------------------------------------------------------------------------------------------------------


def find(method: str, path: str) -> Operation | None:
    return next((operation for operation in operations() if operation.matches(method, path)), None)


def check(
    method: str,
    path: str,
    status: int,
    headers: Mapping[str, str],
    body: bytes | None,
    *,
    has_origin: bool = False,
    sent: bytes | None = None,
) -> None:
    """Raise `ContractError` unless the documents allow an answer.

    Args:
        method: Of the request.
        path: Of the request, or the template; no query.
        status: Of the answer.
        headers: Of the answer.
        body: Of the answer; None if it is not known, as of a stream that goes on.
        has_origin: Whether the request had an Origin header.
        sent: The request's body; one that was accepted must be allowed as well.
    """
    what = f"{method} {path} -> {status}"
    lower = {name.lower(): value for name, value in headers.items()}
    operation = find(method, path)
    if operation is None:
        _check_outside(what, status, lower, body, preflight=method == "OPTIONS" and has_origin)
        return
    if status not in responses(operation):
        raise ContractError(f"{what}: the document has {', '.join(map(str, responses(operation)))} only")
    response = responses(operation)[status]
    _check_headers(what, lower, response, has_origin=has_origin)
    content = response.get("content", {})
    media = lower.get("content-type", "").partition(";")[0].strip()
    if not content:
        if body:
            raise ContractError(f"{what}: has a body, and the document has none")
        return
    if media not in content:
        raise ContractError(f"{what}: is {media or 'of no type'}, expected {', '.join(content)}")
    if body is not None:
        _check_body(what, body, media, content[media])
    if sent and status < 300:
        wanted = operation.node["requestBody"]["content"]["application/json"]["schema"]
        judge(json.loads(sent), wanted, f"{what}, though the request was", formats=False)


def _check_outside(what: str, status: int, headers: dict[str, str], body: bytes | None, *, preflight: bool) -> None:
    if preflight and status == 204:
        if strange := headers.keys() - EVERYWHERE - TO_PAGES - PREFLIGHT:
            raise ContractError(f"{what}: has the headers {', '.join(strange)}")
        return
    if status not in OUTSIDE:
        raise ContractError(f"{what}: not in the documents, so {', '.join(map(str, OUTSIDE))} only")
    allowed = {401: {"www-authenticate"}, 405: {"allow"}}.get(status, set())
    if strange := headers.keys() - EVERYWHERE - TO_PAGES - allowed:
        raise ContractError(f"{what}: has the headers {', '.join(strange)}")
    if missing := allowed - headers.keys():
        raise ContractError(f"{what}: lacks the headers {', '.join(missing)}")
    if body:  # an answer to HEAD has none
        envelope = components()["schemas"]["ErrorBody"]
        judge(json.loads(body), envelope, what)
        if json.loads(body)["code"] != OUTSIDE[status]:
            raise ContractError(f"{what}: the code should be {OUTSIDE[status]}, got {body.decode()}")


def _check_headers(what: str, headers: dict[str, str], response: dict[str, Any], *, has_origin: bool) -> None:
    declared = {name.lower(): resolve(node) for name, node in response.get("headers", {}).items()}
    if strange := headers.keys() - declared.keys() - EVERYWHERE - (TO_PAGES if has_origin else set()):
        raise ContractError(f"{what}: the document does not have the headers {', '.join(sorted(strange))}")
    for name, node in declared.items():
        if name not in headers:
            if node.get("required"):
                raise ContractError(f"{what}: lacks the header {name}")
            continue
        text = headers[name]
        value = int(text) if node["schema"].get("type") == "integer" and text.isdecimal() else text
        judge(value, node["schema"], f"{what}, header {name}")


def _check_body(what: str, body: bytes, media: str, node: dict[str, Any]) -> None:
    if media == "application/json":
        judge(json.loads(body), node["schema"], what)
    elif media == "text/event-stream":
        check_events(what, body.decode(), node["x-sse-events"])


# --- streams ---------------------------------------------------------------------------------------------------------


def frames(text: str) -> Iterator[dict[str, str]]:
    """The events of a stream, the last one left out if it is cut off; comments are no events."""
    for block in text.split("\n\n")[:-1]:
        lines = [line for line in block.split("\n") if not line.startswith(":")]
        if lines:
            yield dict(line.split(": ", 1) for line in lines)


def check_events(what: str, text: str, events: dict[str, Any]) -> None:
    """Raise `ContractError` unless a stream, or the beginning of one, is as the documents say."""
    previous: dict[str, str] | None = None
    for frame in frames(text):
        if list(frame) != ["id", "event", "data"]:
            raise ContractError(f"{what}: an event has the fields {', '.join(frame)}, expected id, event, data")
        kind, number = frame["event"], int(frame["id"])
        if kind not in events:
            raise ContractError(f"{what}: there is no event {kind!r}; there are {', '.join(events)}")
        judge(json.loads(frame["data"]), events[kind], f"{what}, event {kind}")
        if previous is not None and number != int(previous["id"]) + 1:
            raise ContractError(f"{what}: event {number} follows {previous['id']}")
        if previous is not None and previous["event"] == "end":
            raise ContractError(f"{what}: {kind} follows end")
        if (kind == "started") != (number == 0) and not (kind == "end" and number == 0):
            raise ContractError(f"{what}: event {number} is {kind}")
        previous = frame


# --- a session -------------------------------------------------------------------------------------------------------


class _Watched:
    """A response's content that notes what is read of it line by line."""

    def __init__(self, content: aiohttp.StreamReader, what: str, events: dict[str, Any]) -> None:
        self._content = content
        self._seen = ""
        self._what, self._events = what, events

    def __getattr__(self, name: str) -> Any:
        return getattr(self._content, name)

    async def readline(self) -> bytes:
        line = await self._content.readline()
        self._seen += line.decode()
        if not line:
            check_events(self._what, self._seen, self._events)
        return line


def trace() -> aiohttp.TraceConfig:
    """For ``aiohttp.ClientSession(trace_configs=[…])``: what the session gets is checked, and raised in its caller."""
    config = aiohttp.TraceConfig(trace_config_ctx_factory=_context)  # type: ignore[arg-type]  # called as documented
    config.on_request_chunk_sent.append(_note_sent)
    config.on_request_end.append(_check_head)
    config.on_response_chunk_received.append(_check_answer)
    return config


def _context(trace_request_ctx: object = None) -> types.SimpleNamespace:
    return types.SimpleNamespace(sent=b"", response=None, has_origin=False)


async def _note_sent(
    _session: aiohttp.ClientSession, context: types.SimpleNamespace, params: aiohttp.TraceRequestChunkSentParams
) -> None:
    context.sent += params.chunk


async def _check_head(
    _session: aiohttp.ClientSession, context: types.SimpleNamespace, params: aiohttp.TraceRequestEndParams
) -> None:
    response = context.response = params.response
    context.has_origin = "Origin" in params.headers
    path = params.url.raw_path
    check(params.method, path, response.status, response.headers, None, has_origin=context.has_origin)
    operation = find(params.method, path)
    if operation is not None and response.content_type == "text/event-stream":
        media = responses(operation)[response.status]["content"]["text/event-stream"]
        watched = _Watched(response.content, f"{params.method} {path}", media["x-sse-events"])
        response.content = watched  # type: ignore[assignment]


async def _check_answer(
    _session: aiohttp.ClientSession, context: types.SimpleNamespace, params: aiohttp.TraceResponseChunkReceivedParams
) -> None:
    response: aiohttp.ClientResponse = context.response
    check(
        params.method,
        urlsplit(str(params.url)).path,
        response.status,
        response.headers,
        params.chunk,
        has_origin=context.has_origin,
        sent=context.sent,
    )
