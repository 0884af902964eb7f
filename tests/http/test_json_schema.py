"""``json_schema`` in a task: JSON comes out, and what cannot be kept to is refused with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from testkit.harness import serving, text_of
from testkit.tiny_gguf import CHATML, PIECES, write_tiny_llama

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    "more", [{"prompt": "the"}, {"messages": [{"role": "user", "content": "who?"}]}], ids=["prompt", "messages"]
)
async def test_the_text_is_json_for_the_schema(tiny_model_path: Path, more: dict[str, Any]) -> None:
    async with serving(tiny_model_path) as server:
        events = await server.events(await server.submit(json_schema=PERSON, max_tokens=100, **more))
    jsonschema.validate(json.loads(text_of(events)), PERSON)
    assert events[-1].data["finish_reason"] == "stop"


async def test_true_is_any_object(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path) as server:
        events = await server.events(await server.submit(prompt="the", json_schema=True, max_tokens=8))
    assert text_of(events).startswith("{")


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (False, "json_schema: false allows nothing; send a JSON Schema or true, or leave it out"),
        ("text", "json_schema: expected a JSON Schema, or true for any JSON object"),
        ([], "json_schema: expected a JSON Schema, or true for any JSON object"),
        ({"properties": {"a": {"not": {}}}}, 'json_schema: #/properties/a: not supported: ["not"]'),
        ({"$ref": "#"}, "json_schema: #: no JSON is valid for it"),
    ],
)
async def test_what_cannot_be_kept_to_is_a_400_with_its_place(
    tiny_model_path: Path, schema: object, message: str
) -> None:
    async with serving(tiny_model_path) as server:
        answer = await server.post(prompt="the", json_schema=schema)
        assert (answer.status, answer.json()["code"]) == (400, "INVALID_PARAMS")
        assert answer.json()["message"].startswith(message)
        assert (await server.post(prompt="the")).status == 202


async def test_a_schema_that_would_end_the_process_does_not(tiny_model_path: Path) -> None:
    links = {f"d{number}": {"anyOf": [{"$ref": f"#/$defs/d{number + 1}"}]} for number in range(1000)}
    schema = {"$ref": "#/$defs/d0", "$defs": {**links, "d1000": {"type": "string"}}}
    async with serving(tiny_model_path) as server:
        answer = await server.post(prompt="the", json_schema=schema)
        assert answer.status == 400
        assert "too much time or memory" in answer.json()["message"]
        events = await server.events(await server.submit(prompt="the", json_schema=PERSON, max_tokens=100))
    jsonschema.validate(json.loads(text_of(events)), PERSON)


async def test_a_template_that_opens_the_thinking_is_refused(tmp_path: Path) -> None:
    template = CHATML.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n")
    model = write_tiny_llama(tmp_path / "thinks.gguf", chat_template=template)
    async with serving(model) as server:
        messages = [{"role": "user", "content": "who?"}]
        answer = await server.post(messages=messages, json_schema=True)
        assert answer.status == 400
        assert "enable_thinking" in answer.json()["message"]
        assert (await server.post(messages=messages)).status == 202


async def test_a_waiting_task_keeps_its_schema_over_a_reload_to_another_vocabulary(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    write_tiny_llama(tmp_path / "other.gguf", pieces=tuple(reversed(PIECES)))
    async with serving(tiny_model_path, pool={"slots": 1}, models={"roots": [str(tmp_path)]}) as server:
        server.brake.hold()
        running = await server.submit(prompt="the", max_tokens=4)
        await server.started(1)
        waiting = await server.submit(prompt="the", json_schema=PERSON, max_tokens=100)
        assert (await server.request("POST", "/v1/pools/default/reload", new_model_ref="other")).status == 200
        server.brake.release()
        await server.events(running)
        events = await server.events(waiting)
    jsonschema.validate(json.loads(text_of(events)), PERSON)
