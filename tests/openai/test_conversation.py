"""Messages as a conversation that every chat template accepts."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from orchd.errors import InvalidParams
from orchd.openai.conversation import conversation
from orchd.openai.wire import Message

ASK = {"role": "user", "content": "Weather in Paris and Rome?"}
CALLS = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}},
        {"id": "2", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}},
    ],
}
RETURNED: list[dict[str, Any]] = [
    {"role": "tool", "tool_call_id": "2", "content": "sun"},
    {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "rain"}]},
]
CALLS_TEXT = (
    '{"tool_calls": [{"name": "weather", "arguments": {"city": "Paris"}}, '
    '{"name": "weather", "arguments": {"city": "Rome"}}]}'
)
RETURNED_TEXT = 'Result of weather({"city": "Rome"}):\nsun\n\nResult of weather({"city": "Paris"}):\nrain'


def turns(*messages: dict[str, Any], instructions: str | None = None) -> list[tuple[str, str]]:
    made = conversation(msgspec.convert(messages, tuple[Message, ...]), instructions=instructions)
    assert all(turn.keys() == {"role", "content"} for turn in made)
    return [(turn["role"], turn["content"]) for turn in made]


def test_text_stays_as_it_is() -> None:
    messages = [{"role": "system", "content": "Be brief."}, ASK, {"role": "assistant", "content": " Hm\n"}, ASK]
    assert turns(*messages) == [(message["role"], message["content"]) for message in messages]


def test_parts_are_lines_of_one_text() -> None:
    assert turns({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}) == [
        ("user", "a\nb")
    ]


def test_what_follows_each_other_in_one_role_is_one_turn() -> None:
    assert turns(
        {"role": "system", "content": "a"},
        {"role": "developer", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "user", "content": "d"},
        {"role": "assistant", "content": "e"},
        {"role": "system", "content": "f"},
    ) == [("system", "a\n\nb"), ("user", "c\n\nd"), ("assistant", "e"), ("user", "f")]


@pytest.mark.parametrize("instructions", [None, "Functions: ..."])
def test_calls_and_results_are_turns_of_assistant_and_user(instructions: str | None) -> None:
    made = turns(ASK, CALLS, *RETURNED, instructions=instructions)
    assert made[-3:] == [("user", ASK["content"]), ("assistant", CALLS_TEXT), ("user", RETURNED_TEXT)]
    assert made[:-3] == ([] if instructions is None else [("system", instructions)])


def test_with_tools_the_assistant_has_always_written_json() -> None:
    made = turns(ASK, {"role": "assistant", "content": 'Say "where".'}, ASK, instructions="Functions: ...")
    assert made[2] == ("assistant", '{"content": "Say \\"where\\"."}')


def test_instructions_come_behind_the_system_message() -> None:
    made = turns({"role": "system", "content": "Be brief."}, ASK, instructions="Functions: ...")
    assert made == [("system", "Be brief.\n\nFunctions: ..."), ("user", ASK["content"])]


def test_a_call_with_text_beside_it_keeps_both() -> None:
    [_, (_, said), *_] = turns(ASK, CALLS | {"content": "Let me see."}, *RETURNED)
    assert said == '{"content": "Let me see.", ' + CALLS_TEXT[1:]


@pytest.mark.parametrize("arguments", ["", "{", "[" * 5000])
def test_arguments_that_are_no_json_are_text(arguments: str) -> None:
    call = {"id": "1", "function": {"name": "f", "arguments": arguments}}
    [_, (_, said)] = turns(ASK, {"role": "assistant", "tool_calls": [call]})
    assert msgspec.json.decode(said)["tool_calls"] == [{"name": "f", "arguments": arguments}]


def test_a_result_of_a_forgotten_call_is_still_told() -> None:
    assert turns(ASK, {"role": "tool", "tool_call_id": "9", "content": "sun"})[0][1].endswith(
        "\n\nResult of a function:\nsun"
    )


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file"])
def test_what_is_no_text_is_refused(kind: str) -> None:
    with pytest.raises(
        InvalidParams, match=rf"messages\[1\]\.content\[0\]: '{kind}' is not supported, because orchd reads only text"
    ):
        turns(ASK, {"role": "user", "content": [{"type": kind, kind: {}}]})


def test_with_tools_somebody_must_have_asked() -> None:
    with pytest.raises(InvalidParams, match="messages: the last one is the assistant's"):
        turns(ASK, {"role": "assistant", "content": "Hm"}, instructions="Functions: ...")
