"""``openapi/`` is valid, is in style, and says the same as the code, in both directions."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any, get_args

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
from testkit import openapi_check
from testkit.openapi_check import (
    DOCUMENTS,
    FOLDER,
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


@pytest.mark.skipif(shutil.which("redocly") is None, reason="no redocly; npm install --global @redocly/cli")
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
