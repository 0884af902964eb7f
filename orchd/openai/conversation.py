"""OpenAI's messages as a conversation that every chat template accepts: one system message, then turns by turns.

Templates differ in what they take. Nearly all take a system message at the beginning, and after it the user and the
assistant in turn; many reject two messages of the same role, a later system message, or the role ``tool``. So all of
these are written into turns of the user, and what follows each other in one role becomes one turn. What a function
returned is a turn of the user that names the call; a call is the JSON that the model itself writes for one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby

import msgspec

from orchd.errors import InvalidParams
from orchd.openai.wire import CalledFunction, Message

Turn = dict[str, str]
"""``role`` and ``content``, as a task has them."""


def conversation(messages: Sequence[Message], *, instructions: str | None = None) -> list[Turn]:
    """The conversation of a task.

    Args:
        messages: As they were sent.
        instructions: For a model that may call functions: put at the end of the system message. What the assistant
            said before is then written in the form that it is to write now.

    Raises:
        InvalidParams: A message holds something else than text, or nobody has asked anything.
    """
    calls: dict[str, CalledFunction] = {}
    turns: list[tuple[str, str]] = []
    for number, message in enumerate(messages):
        text = _text(message, f"messages[{number}]")
        if message.role == "assistant":
            calls.update((call.id, call.function) for call in message.tool_calls or ())
            turns.append(("assistant", _said(message, text, as_json=instructions is not None)))
        elif message.role == "tool":
            turns.append(("user", _returned(calls.get(message.tool_call_id or ""), text)))
        else:
            first = all(role == "system" for role, _ in turns)
            turns.append(("system" if message.role in ("system", "developer") and first else "user", text))
    if instructions is not None:
        if turns[-1][0] == "assistant":
            raise InvalidParams("messages: the last one is the assistant's, so there is nothing to call a tool for")
        turns.insert(sum(role == "system" for role, _ in turns), ("system", instructions))
    return [
        {"role": role, "content": "\n\n".join(text for _, text in same)}
        for role, same in groupby(turns, key=lambda turn: turn[0])
    ]


def _text(message: Message, where: str) -> str:
    if message.content is None or isinstance(message.content, str):
        return message.content or ""
    for number, part in enumerate(message.content):
        if part.type not in ("text", "refusal"):
            raise InvalidParams(
                f"{where}.content[{number}]: {part.type[:40]!r} is not supported, because orchd reads only text; "
                "leave it out"
            )
    return "\n".join(part.text for part in message.content)


def _said(message: Message, text: str, *, as_json: bool) -> str:
    """In the spelling in which models write JSON under a schema, so that their cache still holds."""
    if not message.tool_calls:
        return f'{{"content": {to_json(text)}}}' if as_json else text
    content = f'"content": {to_json(text)}, ' if text else ""
    calls = ", ".join(_call(call.function) for call in message.tool_calls)
    return f'{{{content}"tool_calls": [{calls}]}}'


def _call(function: CalledFunction) -> str:
    """A call as the model writes it, its arguments as they were written if they are JSON."""
    arguments = function.arguments
    try:
        msgspec.json.decode(arguments, type=msgspec.Raw)
    except (msgspec.DecodeError, RecursionError):
        arguments = to_json(arguments)
    return f'{{"name": {to_json(function.name)}, "arguments": {arguments}}}'


def _returned(function: CalledFunction | None, text: str) -> str:
    named = "a function" if function is None else f"{function.name}({function.arguments})"
    return f"Result of {named}:\n{text}"


def to_json(value: object) -> str:
    """JSON in one line, with a blank after each comma and colon."""
    return json.dumps(value, ensure_ascii=False)
