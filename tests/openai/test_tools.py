"""Functions that a model may call: the choice, what it is told, the schema of its answer."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import msgspec
import pytest

from orchd.errors import InvalidParams
from orchd.openai.tools import MOST_CALLS, ToolPlan, plan
from orchd.openai.wire import ChatRequest

TEXT = {"type": "string"}
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"$ref": "#/$defs/Days"}},
    "required": ["city"],
    "$defs": {"Days": {"type": "integer", "minimum": 1}},
}


def tool(name: str, parameters: dict[str, Any] | None = None, description: str = "") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def planned(*given: dict[str, Any], reply: dict[str, Any] = TEXT, **fields: Any) -> ToolPlan | None:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "tools": given, **fields}
    return plan(msgspec.convert(body, ChatRequest), reply=reply)


def allows(made: ToolPlan | None, answer: object) -> bool:
    assert made is not None
    schema = made.schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return bool(jsonschema.Draft202012Validator(schema).is_valid(answer))


def calling(*calls: tuple[str, Any]) -> dict[str, Any]:
    return {"tool_calls": [{"name": name, "arguments": arguments} for name, arguments in calls]}


def test_auto_is_a_reply_or_calls_whose_arguments_validate() -> None:
    made = planned(tool("weather", WEATHER), tool("time"))
    assert allows(made, {"content": "It rains."})
    assert allows(made, calling(("weather", {"city": "Paris", "days": 2})))
    assert allows(made, calling(("weather", {"city": "Paris"}), ("time", {}), ("weather", {"city": "Rome"})))
    assert not allows(made, calling(("weather", {"city": "Paris", "days": 0})))  # through its own $ref
    assert not allows(made, calling(("weather", {})))
    assert not allows(made, calling(("time", {"zone": "UTC"})))
    assert not allows(made, calling(("rain", {})))
    assert not allows(made, calling())
    assert not allows(made, {"content": "x", **calling(("time", {}))})
    assert not allows(made, calling(*[("time", {})] * (MOST_CALLS + 1)))


def test_required_must_call() -> None:
    made = planned(tool("weather", WEATHER), tool("time"), tool_choice="required")
    assert allows(made, calling(("time", {})))
    assert not allows(made, {"content": "It rains."})
    assert made is not None
    assert "content" not in made.instructions()


def test_a_named_function_is_called_once() -> None:
    made = planned(tool("a"), tool("b"), tool_choice={"type": "function", "function": {"name": "b"}})
    assert allows(made, calling(("b", {})))
    assert not allows(made, calling(("a", {})))
    assert not allows(made, calling(("b", {}), ("b", {})))
    assert not allows(made, {"content": ""})


def test_some_of_the_tools_may_be_allowed() -> None:
    choice = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "b"}}]}
    made = planned(tool("a"), tool("b"), tool_choice={"type": "allowed_tools", "allowed_tools": choice})
    assert allows(made, calling(("b", {}), ("b", {})))
    assert allows(made, {"content": ""})
    assert not allows(made, calling(("a", {})))
    choice["mode"] = "required"
    assert not allows(
        planned(tool("b"), tool_choice={"type": "allowed_tools", "allowed_tools": choice}), {"content": ""}
    )


def test_calls_one_at_a_time() -> None:
    made = planned(tool("a"), parallel_tool_calls=False)
    assert allows(made, calling(("a", {})))
    assert not allows(made, calling(("a", {}), ("a", {})))


@pytest.mark.parametrize("fields", [{"tool_choice": "none"}, {"tools": []}, {"tools": None, "tool_choice": "auto"}])
def test_without_tools_there_is_no_plan(fields: dict[str, Any]) -> None:
    assert planned(**{"tools": [tool("a")], **fields}) is None


def test_a_reply_may_have_a_schema_of_its_own() -> None:
    reply = {"type": "object", "properties": {"next": {"$ref": "#"}}, "additionalProperties": False}
    made = planned(tool("a"), reply=reply)
    assert allows(made, {"content": {"next": {"next": {}}}})
    assert not allows(made, {"content": {"next": {"last": {}}}})
    assert not allows(made, {"content": "text"})


def test_only_references_are_moved() -> None:
    data = {"$ref": "#/$defs/x"}
    parameters = {"type": "object", "properties": {"$ref": {"const": data}, "default": {"$ref": "#/$defs/x"}}}
    made = planned(tool("a", {**parameters, "$defs": {"x": {"type": "integer"}}}))
    assert allows(made, calling(("a", {"$ref": data, "default": 1})))
    assert not allows(made, calling(("a", {"default": "one"})))


def test_more_arguments_only_where_the_schema_says_so() -> None:
    assert not allows(planned(tool("a", {"type": "object", "properties": {}})), calling(("a", {"x": 1})))
    assert allows(planned(tool("a", {"type": "object", "additionalProperties": True})), calling(("a", {"x": 1})))
    assert allows(planned(tool("a", {"type": "object", "allOf": [{}]})), calling(("a", {"x": 1})))


def test_the_dialect_of_parameters_stays_outside() -> None:
    made = planned(tool("a", {"$schema": "http://json-schema.org/draft-07/schema#", "$id": "urn:x", **WEATHER}))
    assert made is not None
    assert not {"$schema", "$id"} & made.schema()["$defs"]["call_a"].keys()


def test_the_model_is_told_what_there_is() -> None:
    made = planned(tool("weather", WEATHER, "Tells the weather."), tool("time"))
    assert made is not None
    title, weather, time, empty, form = made.instructions().splitlines()
    assert (title, empty) == ("You can call these functions:", "")
    assert json.loads(weather) == {"name": "weather", "description": "Tells the weather.", "parameters": WEATHER}
    assert json.loads(time) == {"name": "time", "description": "", "parameters": {}}
    assert '{"tool_calls": [{"name": ..., "arguments": {...}}]}' in form
    assert '{"content": ...}' in form


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"tool_choice": "required", "tools": None}, "tool_choice: there are no tools to choose from"),
        ({"tool_choice": {"type": "function", "function": {"name": "b"}}}, "tool_choice: there is no tool 'b'"),
        ({"tool_choice": {"type": "function"}}, "tool_choice: function is empty; name a tool, such as 'a'"),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"tools": []}}}, "allowed_tools is empty"),
        ({"tools": [tool("a"), tool("a")]}, "tools: two functions have the same name"),
    ],
)
def test_what_contradicts_itself_is_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidParams, match=sentence):
        planned(**{"tools": [tool("a")], **fields})


def test_parameters_that_are_nested_without_end_are_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(500):
        schema = {"items": schema}
    made = planned(tool("deep", schema))
    assert made is not None
    with pytest.raises(InvalidParams, match=r"tools: deep\.parameters: it is nested more than 64 levels deep"):
        made.schema()
