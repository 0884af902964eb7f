"""Functions that a model may call: what it is told of them, and the JSON Schema that its answer keeps to.

The schema leaves the decision to the model: it writes ``{"tool_calls": [{"name": ..., "arguments": {...}}, ...]}``, or
``{"content": ...}`` to reply. So a JSON Schema is all that the server has to know of tools, and neither the model nor
its chat template needs a format of its own for calls. `orchd.openai.decision` reads what the model writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from orchd.errors import InvalidParams
from orchd.openai.conversation import to_json
from orchd.openai.wire import ChatRequest, Function, ToolChoice

MOST_CALLS: Final = 16
"""Calls in one answer."""

DEEPEST: Final = 64
"""Levels that the parameters of a function may have."""

_CALLS: Final = '{"tool_calls": [{"name": ..., "arguments": {...}}]}'
_REPLY: Final = '{"content": ...}'

_NAMED: Final = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
"""Keywords whose keys are names and whose values are schemas."""

_DATA: Final = frozenset({"const", "enum", "default", "examples"})
"""Keywords whose values are no schemas."""


@dataclass(frozen=True)
class ToolPlan:
    """What the model may do in an answer.

    Attributes:
        functions: Those it may call.
        most_calls: How many calls it may make.
        reply: Schema of what it may say instead; None where it must call.
    """

    functions: tuple[Function, ...]
    most_calls: int
    reply: dict[str, Any] | None

    def instructions(self) -> str:
        """For the system message."""
        functions = [
            to_json({"name": one.name, "description": one.description or "", "parameters": one.parameters or {}})
            for one in self.functions
        ]
        if self.reply is None:
            form = f"Answer with a JSON object that calls functions: {_CALLS}"
        else:
            form = (
                f"Answer with a JSON object. To call functions, write {_CALLS} and you will get their results. "
                f"To reply to the user, write {_REPLY} Call a function only if it helps you to reply."
            )
        return "\n".join(["You can call these functions:", *functions, "", form])

    def schema(self) -> dict[str, Any]:
        """Of the whole answer.

        Raises:
            InvalidParams: The parameters of a function are nested too deeply.
        """
        definitions = {
            f"call_{one.name}": _moved(_parameters(one), f"#/$defs/call_{one.name}", f"tools: {one.name}.parameters")
            for one in self.functions
        }
        calls = [
            _object(name={"const": one.name}, arguments={"$ref": f"#/$defs/call_{one.name}"}) for one in self.functions
        ]
        forms = [
            _object(tool_calls={"type": "array", "items": _any_of(calls), "minItems": 1, "maxItems": self.most_calls})
        ]
        if self.reply is not None:
            definitions["reply"] = _moved(self.reply, "#/$defs/reply", "response_format")
            forms.append(_object(content={"$ref": "#/$defs/reply"}))
        return {**_any_of(forms), "$defs": definitions}


def plan(request: ChatRequest, *, reply: dict[str, Any]) -> ToolPlan | None:
    """What the model may do, or None where it may call nothing.

    Args:
        request: Has the tools and the choice.
        reply: Schema of a reply.

    Raises:
        InvalidParams: The choice names a tool that is not there, or two tools have one name.
    """
    choice = request.tool_choice
    functions = {tool.function.name: tool.function for tool in request.tools or ()}
    if len(functions) < len(request.tools or ()):
        raise InvalidParams("tools: two functions have the same name; give each a different one")
    if not functions and choice not in (None, "none", "auto"):
        raise InvalidParams("tool_choice: there are no tools to choose from; send tools, or leave it out")
    if not functions or choice == "none":
        return None
    wanted, must_call = _chosen(choice, list(functions)) if isinstance(choice, ToolChoice) else (list(functions), False)
    if missing := [name for name in wanted if name not in functions]:
        raise InvalidParams(f"tool_choice: there is no tool {missing[0]!r}; available: {', '.join(functions)}")
    named = isinstance(choice, ToolChoice) and choice.type == "function"
    return ToolPlan(
        tuple(functions[name] for name in wanted),
        1 if named or request.parallel_tool_calls is False else MOST_CALLS,
        None if must_call or choice == "required" else reply,
    )


def _chosen(choice: ToolChoice, names: Sequence[str]) -> tuple[list[str], bool]:
    """The names of the tools that may be called, and whether one must be."""
    if choice.type == "function" and choice.function is not None:
        return [choice.function.name], True
    if choice.type == "allowed_tools" and choice.allowed_tools is not None and choice.allowed_tools.tools:
        allowed = choice.allowed_tools
        return list(dict.fromkeys(tool.function.name for tool in allowed.tools)), allowed.mode == "required"
    raise InvalidParams(f"tool_choice: {choice.type} is empty; name a tool, such as {names[0]!r}")


def _parameters(function: Function) -> dict[str, Any]:
    """A function's parameters, and no others where the schema does not say whether there may be more."""
    schema = {key: value for key, value in (function.parameters or {}).items() if key not in ("$schema", "$id")}
    if not schema.keys() - {"type", "properties", "required", "title", "description", "$defs", "definitions"}:
        schema = {"type": "object", "properties": {}, **schema, "additionalProperties": False}
    return schema


def _moved(schema: Any, to: str, where: str, *, levels: int = DEEPEST, named: bool = False) -> Any:
    """A schema whose references to itself still hold where it is part of another.

    Args:
        schema: A schema, or a part of one.
        to: Where it will be, as a reference.
        where: The same for people.
        levels: How deep it may be.
        named: Whether this part's keys are names and not keywords.
    """
    if levels == 0:
        raise InvalidParams(f"{where}: it is nested more than {DEEPEST} levels deep; make it flatter")
    if isinstance(schema, list):
        return [_moved(item, to, where, levels=levels - 1) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved: dict[str, Any] = {}
    for key, value in schema.items():
        if not named and key == "$ref" and isinstance(value, str) and value.startswith("#"):
            moved[key] = to + value[1:]
        elif not named and key in _DATA:
            moved[key] = value
        else:
            moved[key] = _moved(value, to, where, levels=levels - 1, named=not named and key in _NAMED)
    return moved


def _object(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _any_of(schemas: list[Any]) -> dict[str, Any]:
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
