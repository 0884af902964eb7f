"""``openapi/`` is valid, is in style, and says the same as the code, in both directions."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import aiohttp
import aiohttp.web
import msgspec
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from engines.api import FinishReason
from orchd import schemas
from orchd.errors import Code
from orchd.http.errors import STATUS
from orchd.http.routes import ROUTES
from orchd.queue.events import Event, frame
from orchd.schemas import StrictWire, Wire
from orchd.service import Service
from testkit import openapi_check
from testkit.harness import serving
from testkit.openapi_check import (
    DOCUMENTS,
    FOLDER,
    ContractError,
    check,
    components,
    judge,
    load,
    operations,
    resolve,
    responses,
)

ONLY_INSIDE_END = {Code.DECODE_TIMEOUT, Code.WORKER_RESET}
OUTSIDE_OPERATIONS = {Code.METHOD_NOT_ALLOWED}

STRUCTS: dict[str, type[Wire]] = {
    name: kind
    for name, kind in vars(schemas).items()
    if isinstance(kind, type) and issubclass(kind, Wire) and kind not in (Wire, StrictWire)
}


def walk(node: Any) -> Iterator[dict[str, Any]]:
    """Every mapping in a document."""
    if isinstance(node, dict):
        yield node
        for value in node.values():
            yield from walk(value)
    elif isinstance(node, list):
        for item in node:
            yield from walk(item)


# --- valid -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_document_is_valid(document: str) -> None:
    OpenAPIV31SpecValidator(load(document), base_uri=(FOLDER / document).as_uri()).validate()


@pytest.mark.skipif(shutil.which("redocly") is None, reason="redocly, an npm program, is not installed here")
def test_the_linter_has_no_complaint() -> None:
    files = [str(FOLDER / document) for document in DOCUMENTS]
    done = subprocess.run(
        ["redocly", "lint", "--config", str(FOLDER / "redocly.yaml"), *files],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout


def examples() -> Iterator[Any]:
    for operation in operations():
        contents = [("request", operation.node.get("requestBody", {}).get("content", {}))]
        contents += [(str(status), node.get("content", {})) for status, node in responses(operation).items()]
        for where, content in contents:
            for media, node in content.items():
                names = node.get("examples", {})
                yield pytest.param(media, node, names, id=f"{operation.node['operationId']} {where} {media}")


@pytest.mark.parametrize(("media", "node", "named"), list(examples()))
def test_every_content_has_examples_that_fit_it(media: str, node: dict[str, Any], named: dict[str, Any]) -> None:
    assert named
    for name, example in named.items():
        if media == "text/event-stream":
            openapi_check.check_events(name, example["value"], node["x-sse-events"])
            assert example["value"].endswith("\n\n")
        else:
            judge(example["value"], node["schema"], name)


# --- in style --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", operations(), ids=lambda operation: operation.node["operationId"])
def test_an_operation_says_what_a_reader_needs(operation: openapi_check.Operation) -> None:
    assert operation.node["summary"]
    assert operation.node["description"]
    assert operation.node["tags"]
    assert {status for status in responses(operation) if status >= 400} >= {400, 401, 403, 500}
    assert all(node["description"].endswith(".") for node in responses(operation).values())


@pytest.mark.parametrize("name", components()["schemas"])
def test_a_schema_is_described_and_closed(name: str) -> None:
    node = components()["schemas"][name]
    assert node["description"]
    if node.get("type") == "object":
        assert node["additionalProperties"] is False


def test_every_reference_leads_somewhere_and_every_component_is_used() -> None:
    used = set()
    for document in DOCUMENTS:
        for node in walk(load(document)):
            if isinstance(node.get("$ref"), str):
                assert resolve(node)
                used.add(node["$ref"].partition("#/components/")[2])
    defined = {f"{kind}/{name}" for kind, named in components().items() for name in named if kind != "securitySchemes"}
    assert used == defined


def test_the_token_is_a_bearer_and_may_be_in_the_query_of_the_stream_only() -> None:
    schemes = components()["securitySchemes"]
    assert {name: (node["type"], node.get("scheme"), node.get("in")) for name, node in schemes.items()} == {
        "bearer": ("http", "bearer", None),
        "accessToken": ("apiKey", None, "query"),
    }
    assert {tuple(load(document)["security"][0]) for document in DOCUMENTS} == {("bearer",)}
    with_own = {
        operation.path: operation.node["security"] for operation in operations() if "security" in operation.node
    }
    assert with_own == {"/v1/tasks/{id}/stream": [{"bearer": []}, {"accessToken": []}]}


# --- the same as the code --------------------------------------------------------------------------------------------


def test_the_routes_are_the_same() -> None:
    assert {(operation.method, operation.path) for operation in operations()} == {
        (route.method, route.path) for route in ROUTES
    }
    assert len(list(operations())) == len(ROUTES)


def test_the_schemas_have_the_same_names() -> None:
    _, ours = msgspec.json.schema_components(STRUCTS.values())
    assert set(components()["schemas"]) == set(ours)


def bare(node: Any) -> Any:
    """A schema without what only explains it; order of choices does not count."""
    if isinstance(node, list):
        return [bare(item) for item in node]
    if not isinstance(node, dict):
        return node
    made = {key: bare(value) for key, value in node.items() if key not in ("title", "description", "examples")}
    if "enum" in made:
        made["enum"] = sorted(made["enum"])
    if "required" in made:
        made["required"] = sorted(made["required"])
    if made.get("default") == ():
        made["default"] = []
    return made


def code_schema(name: str) -> Any:
    """A component as the code has it."""
    _, ours = msgspec.json.schema_components(STRUCTS.values(), ref_template="#/components/schemas/{name}")
    return bare(json.loads(msgspec.json.encode(ours[name])))


@pytest.mark.parametrize("name", [name for name, kind in STRUCTS.items() if issubclass(kind, StrictWire)])
def test_what_is_received_is_described_exactly(name: str) -> None:
    node = bare(components()["schemas"][name])
    node.pop("oneOf", None)  # exactly one of prompt and messages, which a struct cannot say
    assert node == code_schema(name)


@pytest.mark.parametrize("name", [name for name, kind in STRUCTS.items() if not issubclass(kind, StrictWire)])
def test_what_is_sent_is_described_and_at_most_narrower(name: str) -> None:
    node, ours, kind = bare(components()["schemas"][name]), code_schema(name), STRUCTS[name]
    if not kind.__struct_config__.omit_defaults:
        ours["required"] = sorted(ours["properties"])  # a default is sent, too
    assert node["required"] == ours["required"]
    assert set(node["properties"]) == set(ours["properties"])
    for field, described in node["properties"].items():
        narrower = {
            k: v for k, v in described.items() if k not in ("minimum", "minLength", "maxLength", "format", "const")
        }
        wanted = ours["properties"][field]
        if field not in ours["required"]:  # it is left out rather than null
            wanted = next(part for part in wanted["anyOf"] if part != {"type": "null"})
        assert narrower == wanted, field


@pytest.mark.parametrize("name", ["Code", "Priority", "FinishReason"])
def test_a_choice_has_the_same_values(name: str) -> None:
    assert bare(components()["schemas"][name]) == code_schema(name)


def test_each_status_has_the_codes_that_the_code_gives_it() -> None:
    described: set[Code] = set()
    for operation in operations():
        for status, node in responses(operation).items():
            parts = node.get("content", {}).get("application/json", {}).get("schema", {}).get("allOf", ())
            for part in parts:
                for code in part.get("properties", {}).get("code", {}).get("enum", ()):
                    assert STATUS[Code(code)] == status
                    described.add(Code(code))
    assert described == set(Code) - ONLY_INSIDE_END - OUTSIDE_OPERATIONS
    assert {Code(code): status for status, code in openapi_check.OUTSIDE.items()}.items() <= STATUS.items()


def test_every_error_status_of_every_operation_has_a_code() -> None:
    for operation in operations():
        for status in responses(operation):
            if status >= 400:
                assert status in STATUS.values()


def test_the_events_are_the_same() -> None:
    stream = next(operation for operation in operations() if operation.path.endswith("/stream"))
    events = responses(stream)[200]["content"]["text/event-stream"]["x-sse-events"]
    described = {
        (name, one["$ref"].rpartition("/")[2]) for name, node in events.items() for one in node.get("oneOf", [node])
    }
    samples: dict[type, Event] = {
        schemas.Started: schemas.Started(queue_position=0, predicted_start_ms=0),
        schemas.Token: schemas.Token(t="a", i=0),
        schemas.Reasoning: schemas.Reasoning(r="a", i=0),
        schemas.End: schemas.End(
            tokens_in=1, tokens_cached=0, tokens_out=0, decode_ms=0, finish_reason=FinishReason.STOP
        ),
    }
    assert set(samples) == set(get_args(Event))
    framed = {
        (next(openapi_check.frames(frame(0, event).decode()))["event"], kind.__name__)
        for kind, event in samples.items()
    }
    assert described == framed


# --- the checker itself ----------------------------------------------------------------------------------------------

HEADERS = {"Content-Type": "application/json"}
ACCEPTED = (
    b'{"task_id":"6f1c9f0e-8a53-4f0b-9d0c-3a1f5c2b7e44","queue_position":0,"predicted_start_ms":1,"backoff_ms":0}'
)
REFUSED = b'{"code":"ADMISSION_REJECT","message":"full","engine":"llamacpp"}'
PAUSE = {"Retry-After": "1", "X-Backoff-Ms": "12"}
EVENTS = b'id: 0\nevent: started\ndata: {"queue_position":0,"predicted_start_ms":0}\n\n'
FIGURES = b'"tokens_in":1,"tokens_cached":0,"tokens_out":0,"decode_ms":0'
END = b'id: 1\nevent: end\ndata: {%b,"finish_reason":"stop"}\n\n' % FIGURES
STREAM = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
ENVELOPE = b'{"code":"NOT_FOUND","message":"no","engine":"llamacpp"}'


@pytest.mark.parametrize(
    ("method", "path", "status", "headers", "body"),
    [
        ("POST", "/v1/tasks", 202, HEADERS, ACCEPTED),
        ("POST", "/v1/tasks", 429, HEADERS | PAUSE, REFUSED),
        ("GET", "/v1/tasks/x/stream", 200, STREAM, EVENTS + b": keep-alive\n\n" + END),
        ("GET", "/v1/tasks/x/stream", 200, STREAM, EVENTS),
        ("GET", "/v1/tasks/x/stream", 204, {}, b""),
        ("GET", "/nowhere", 404, HEADERS, ENVELOPE),
        ("HEAD", "/health", 405, HEADERS | {"Allow": "GET"}, b""),
    ],
)
def test_the_checker_lets_right_answers_pass(
    method: str, path: str, status: int, headers: dict[str, str], body: bytes
) -> None:
    check(method, path, status, headers, body)


@pytest.mark.parametrize(
    ("method", "path", "status", "headers", "body"),
    [
        ("POST", "/v1/tasks", 201, HEADERS, ACCEPTED),
        ("POST", "/v1/tasks", 202, HEADERS, ACCEPTED.replace(b"}", b',"correlation_id":"x"}')),
        ("POST", "/v1/tasks", 202, HEADERS, ACCEPTED.replace(b',"backoff_ms":0', b"")),
        ("POST", "/v1/tasks", 202, HEADERS, ACCEPTED.replace(b":1,", b":-1,")),
        ("POST", "/v1/tasks", 202, HEADERS, ACCEPTED.replace(b"6f1c", b"zzzz")),
        ("POST", "/v1/tasks", 202, HEADERS | {"X-Correlation-Id": "x"}, ACCEPTED),
        ("POST", "/v1/tasks", 202, {"Content-Type": "text/plain"}, ACCEPTED),
        ("POST", "/v1/tasks", 429, HEADERS, REFUSED),
        ("POST", "/v1/tasks", 429, HEADERS | PAUSE | {"Retry-After": "0"}, REFUSED),
        ("POST", "/v1/tasks", 429, HEADERS | PAUSE, REFUSED.replace(b"}", b',"policy_label":"x"}')),
        ("POST", "/v1/tasks", 429, HEADERS | PAUSE, REFUSED.replace(b"ADMISSION_REJECT", b"INTERNAL")),
        ("GET", "/v1/tasks/x/stream", 200, STREAM, EVENTS + END.replace(b"id: 1", b"id: 2")),
        ("GET", "/v1/tasks/x/stream", 200, STREAM, END.replace(b"event: end", b"event: started")),
        ("GET", "/v1/tasks/x/stream", 200, STREAM, EVENTS + END + END.replace(b"id: 1", b"id: 2")),
        ("GET", "/v1/tasks/x/stream", 200, STREAM, EVENTS + END.replace(b"event: end", b"event: metrics")),
        ("GET", "/v1/tasks/x/stream", 200, STREAM, EVENTS + END.replace(b'"stop"', b'"error"')),
        ("GET", "/v1/tasks/x/stream", 204, {}, b"x"),
        ("GET", "/nowhere", 200, HEADERS, b"{}"),
        ("GET", "/nowhere", 404, HEADERS, ENVELOPE.replace(b"NOT_FOUND", b"INTERNAL")),
        ("GET", "/nowhere", 404, HEADERS | {"X-Request-Id": "1"}, ENVELOPE),
        ("PUT", "/health", 405, HEADERS, ENVELOPE.replace(b"NOT_FOUND", b"METHOD_NOT_ALLOWED")),
    ],
)
def test_the_checker_finds_wrong_answers(
    method: str, path: str, status: int, headers: dict[str, str], body: bytes
) -> None:
    with pytest.raises(ContractError):
        check(method, path, status, headers, body)


def test_the_checker_finds_a_request_that_should_not_have_been_taken() -> None:
    with pytest.raises(ContractError, match="tenant"):
        check("POST", "/v1/tasks", 202, HEADERS, ACCEPTED, sent=b'{"prompt": "a", "tenant": "x"}')
    with pytest.raises(ContractError):
        check("POST", "/v1/tasks", 202, HEADERS, ACCEPTED, sent=b'{"prompt": "a", "messages": []}')


async def test_a_traced_session_raises_what_the_checker_finds() -> None:
    async def wrong(request: aiohttp.web.Request) -> aiohttp.web.Response:
        return aiohttp.web.json_response({"status": "ok", "pools": [], "request_id": 1})

    app = aiohttp.web.Application()
    app.router.add_get("/health", wrong)
    runner = aiohttp.web.AppRunner(app)
    await runner.setup()
    await aiohttp.web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        async with aiohttp.ClientSession(trace_configs=[openapi_check.trace()]) as session:
            async with session.get(f"{url}/health") as response:
                with pytest.raises(ContractError, match="request_id"):
                    await response.read()
            with pytest.raises(ContractError):
                await session.get(f"{url}/v1/tasks/x/stream")
    finally:
        await runner.cleanup()


async def test_the_harness_checks_every_answer(tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def answer(self: Service, request: schemas.TaskRequest) -> dict[str, object]:
        return {**json.loads(ACCEPTED), "correlation_id": "x"}

    async with serving(tiny_model_path) as server:
        monkeypatch.setattr(Service, "submit", answer)
        with pytest.raises(ContractError, match="correlation_id"):
            await server.post(prompt="the")
