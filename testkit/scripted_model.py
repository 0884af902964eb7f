"""A stand-in for the server whose model keeps to a JSON Schema, and which calls a function before it replies.

For programs that need a model that decides: what a tiny one decides cannot be relied on.
"""

from __future__ import annotations

import json
from typing import Any

from aiohttp import web

from testkit import stand_in as s
from testkit.stand_in import StandIn

REPLY = "The river flows into the sea."


def serve_scripted(server: StandIn) -> None:
    """Have the stand-in answer any number of tasks."""
    texts: dict[str, str] = {}

    async def submit(stand_in: StandIn, request: web.Request, body: bytes) -> web.StreamResponse:
        task = json.loads(body)
        texts[task["task_id"]] = text_for(task)
        return await s.accept()(stand_in, request, body)

    async def stream(stand_in: StandIn, request: web.Request, body: bytes) -> web.StreamResponse:
        text = texts[request.path.split("/")[-2]]
        pieces = [text[at : at + 4] for at in range(0, len(text), 4)]
        tokens = [s.token(n, piece) for n, piece in enumerate(pieces, 1)]
        last = s.end(len(pieces) + 1, tokens_in=20, tokens_cached=5)
        return await s.stream(s.started(), *tokens, last)(stand_in, request, body)

    server.on("GET /health", s.answer(s.health_body()))
    server.on("POST /v1/tasks", submit)
    server.on("GET stream", stream)


def text_for(task: dict[str, Any]) -> str:
    """What the model writes for a task."""
    schema = task.get("json_schema")
    if schema is None:
        return REPLY
    if schema is True:
        return "{}"
    forms = {name: form for form in schema.get("anyOf", [schema]) for name in form.get("properties", {})}
    if "content" in forms and task["messages"][-1]["content"].startswith("Result of "):
        return json.dumps({"content": REPLY})
    return json.dumps(instance(forms.get("tool_calls", schema), schema), separators=(",", ":"))


def instance(schema: dict[str, Any], root: dict[str, Any]) -> Any:
    """Something that is valid for a simple schema."""
    if "$ref" in schema:
        found = root
        for name in schema["$ref"].removeprefix("#/").split("/"):
            found = found[name]
        return instance(found, root)
    for keyword in ("const", "enum", "anyOf"):
        if keyword in schema:
            value = schema[keyword]
            return value if keyword == "const" else value[0] if keyword == "enum" else instance(value[0], root)
    match schema.get("type"):
        case "object":
            return {name: instance(inner, root) for name, inner in schema.get("properties", {}).items()}
        case "array":
            return [instance(schema["items"], root)]
        case "integer" | "number":
            return schema.get("minimum", 1)
        case "boolean":
            return True
        case _:
            return "Rhine"
