"""Chat completions, over a server that answers as scripted."""

from __future__ import annotations

import json
from typing import Any

import pytest

from testkit import stand_in as s
from testkit.bridge import Bridge
from testkit.stand_in import StandIn
from tests.openai.script import task, writing

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"properties": {"city": {"type": "string"}}}}}
CALL = '{"tool_calls":[{"name":"weather","arguments":{"city":"Paris"}},{"name":"weather","arguments":{"city":"Rome"}}]}'
USAGE = {
    "prompt_tokens": 7,
    "total_tokens": 9,
    "completion_tokens": 2,
    "prompt_tokens_details": {"cached_tokens": 3},
    "completion_tokens_details": {"reasoning_tokens": 0},
}


def user(content: object) -> dict[str, object]:
    return {"role": "user", "content": content}


def pieces(text: str, size: int = 5) -> list[str]:
    return [text[at : at + size] for at in range(0, len(text), size)]


def deltas(chunks: list[dict[str, Any]], index: int = 0) -> list[dict[str, Any]]:
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return [choice["delta"] for choice in choices if choice["index"] == index]


async def test_a_whole_answer(server: StandIn, bridge: Bridge) -> None:
    writing(server, "Hel", "lo")
    answer = await bridge.chat()
    body = answer.json()
    assert (answer.status, answer.headers["Content-Type"]) == (200, "application/json")
    assert body.pop("id").startswith("chatcmpl-")
    assert body.pop("created") > 0
    message = {"role": "assistant", "content": "Hello", "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
    assert body == {"object": "chat.completion", "model": "tiny-llama", "choices": [choice], "usage": USAGE}
    assert task(server)["messages"] == [{"role": "user", "content": "hi"}]


async def test_a_streamed_answer(server: StandIn, bridge: Bridge) -> None:
    writing(server, "Hel", "lo")
    answer = await bridge.chat(stream=True)
    chunks = answer.chunks()
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    assert deltas(chunks) == [{"role": "assistant", "content": ""}, {"content": "Hel"}, {"content": "lo"}, {}]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]
    assert not any("usage" in chunk for chunk in chunks)


async def test_usage_comes_with_the_last_chunk_if_asked_for(server: StandIn, bridge: Bridge) -> None:
    writing(server, "Hel", "lo")
    chunks = (await bridge.chat(stream=True, stream_options={"include_usage": True})).chunks()
    assert [chunk["usage"] for chunk in chunks] == [None, None, None, None, USAGE]
    assert chunks[-1]["choices"] == []


async def test_what_a_model_thinks_is_apart(server: StandIn, bridge: Bridge) -> None:
    writing(server, "Hello", thought=("Hm", "m."))
    whole = (await bridge.chat()).json()
    assert whole["choices"][0]["message"] == {
        "role": "assistant",
        "content": "Hello",
        "reasoning_content": "Hmm.",
        "refusal": None,
    }
    assert whole["usage"]["completion_tokens_details"] == {"reasoning_tokens": 2}
    assert deltas((await bridge.chat(stream=True)).chunks())[1:4] == [
        {"reasoning_content": "Hm"},
        {"reasoning_content": "m."},
        {"content": "Hello"},
    ]
    assert all(seen.body["reasoning"] is True for seen in server.requests("POST /v1/tasks"))


async def test_length_is_told(server: StandIn, bridge: Bridge) -> None:
    writing(server, "Hel", reason="length")
    assert (await bridge.chat()).json()["choices"][0]["finish_reason"] == "length"


async def test_everything_that_a_task_can_do_is_passed_on(server: StandIn, bridge: Bridge) -> None:
    writing(server, "x")
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    await bridge.chat(
        max_completion_tokens=5,
        max_tokens=6,
        temperature=0.5,
        top_p=0.9,
        top_k=3,
        min_p=0.1,
        repeat_penalty=1.1,
        seed=-1,
        stop="END",
        service_tier="flex",
        reasoning_effort="none",
        chat_template_kwargs={"tone": "dry"},
        response_format={"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": schema}},
    )
    body = task(server)
    del body["task_id"], body["messages"]
    assert body == {
        "pool_id": "default",
        "priority": "batch",
        "max_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "min_p": 0.1,
        "repeat_penalty": 1.1,
        "seed": 2**32 - 1,
        "stop": ["END"],
        "reasoning": True,
        "chat_template_kwargs": {"enable_thinking": False, "tone": "dry"},
        "json_schema": schema,
    }


async def test_any_json_object(server: StandIn, bridge: Bridge) -> None:
    writing(server, "{}")
    await bridge.chat(response_format={"type": "json_object"})
    assert task(server)["json_schema"] is True


async def test_a_model_is_named_by_its_pool_or_by_itself(server: StandIn, bridge: Bridge) -> None:
    writing(server, "x")
    assert (await bridge.chat(model="tiny-llama")).json()["model"] == "tiny-llama"
    assert task(server)["model_ref"] == "tiny-llama"
    assert "pool_id" not in task(server)


async def test_another_model_is_not_found(server: StandIn, bridge: Bridge) -> None:
    answer = await bridge.chat(model="gpt-4o")
    assert answer.status == 404
    assert answer.error["message"] == "model: there is no model 'gpt-4o'; available: tiny-llama, default"
    assert (answer.error["code"], answer.error["param"]) == ("model_not_found", "model")


async def test_several_choices_are_several_tasks(server: StandIn, bridge: Bridge) -> None:
    writing(server, "a", "b")
    whole = (await bridge.chat(n=3, seed=7)).json()
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
    assert [choice["message"]["content"] for choice in whole["choices"]] == ["ab"] * 3
    assert (whole["usage"]["prompt_tokens"], whole["usage"]["completion_tokens"]) == (7, 6)
    assert sorted(seen.body["seed"] for seen in server.requests("POST /v1/tasks")) == [7, 8, 9]
    chunks = (await bridge.chat(n=2, stream=True)).chunks()
    for index in range(2):
        assert [delta.get("content") for delta in deltas(chunks, index)] == ["", "a", "b", None]


async def test_calls(server: StandIn, bridge: Bridge) -> None:
    writing(server, *pieces(CALL))
    [choice] = (await bridge.chat(tools=[TOOL])).json()["choices"]
    calls = choice["message"]["tool_calls"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
    assert [(call["type"], call["function"]["name"]) for call in calls] == [("function", "weather")] * 2
    assert [json.loads(call["function"]["arguments"]) for call in calls] == [{"city": "Paris"}, {"city": "Rome"}]
    assert len({call["id"] for call in calls}) == 2
    assert task(server)["json_schema"]["$defs"]["call_weather"]["properties"] == {"city": {"type": "string"}}
    assert task(server)["messages"][0]["role"] == "system"


async def test_calls_in_deltas(server: StandIn, bridge: Bridge) -> None:
    writing(server, *pieces(CALL))
    chunks = (await bridge.chat(tools=[TOOL], stream=True)).chunks()
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    calls = [call for delta in deltas(chunks) for call in delta.get("tool_calls", ())]
    begun = [call for call in calls if "id" in call]
    assert [(call["index"], call["type"], call["function"]) for call in begun] == [
        (0, "function", {"name": "weather", "arguments": ""}),
        (1, "function", {"name": "weather", "arguments": ""}),
    ]
    assert "".join(call["function"]["arguments"] for call in calls if call["index"] == 1) == '{"city":"Rome"}'


async def test_a_reply_where_calls_were_possible(server: StandIn, bridge: Bridge) -> None:
    writing(server, *pieces('{"content":"It \\"rains\\"."}'))
    [choice] = (await bridge.chat(tools=[TOOL])).json()["choices"]
    assert choice["message"] == {"role": "assistant", "content": 'It "rains".', "refusal": None}
    assert choice["finish_reason"] == "stop"


async def test_a_reply_ends_before_a_stop_text_where_calls_were_possible(server: StandIn, bridge: Bridge) -> None:
    writing(server, *pieces('{"content":"It rains.\\n\\nOr not."}'))
    [choice] = (await bridge.chat(tools=[TOOL], stop=["Snow", "\n\n"])).json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("It rains.", "stop")
    assert "stop" not in task(server)


async def test_a_long_request_is_answered_too(server: StandIn, bridge: Bridge) -> None:
    writing(server, *pieces(CALL))
    many = [TOOL, *({"function": {"name": f"f{n}", "description": "x" * 1000}} for n in range(100))]
    assert (await bridge.chat(tools=many)).json()["choices"][0]["finish_reason"] == "tool_calls"


async def test_without_a_limit_the_answer_may_fill_the_context(server: StandIn, bridge: Bridge) -> None:
    too_long = "the prompt's more than 200 tokens and max_tokens 256 do not fit into a slot's context of 512; shorten"
    server.on("POST /v1/tasks", s.refuse(400, "INVALID_PARAMS", too_long))
    writing(server, "x")
    assert (await bridge.chat()).status == 200
    assert [seen.body["max_tokens"] for seen in server.requests("POST /v1/tasks")] == [256, 128]


async def test_a_prompt_that_does_not_fit_is_refused_in_the_end(server: StandIn, bridge: Bridge) -> None:
    too_long = "the prompt's more than 500 tokens and max_tokens 16 do not fit into a slot's context of 512; shorten"
    server.on("POST /v1/tasks", s.refuse(400, "INVALID_PARAMS", too_long))
    answer = await bridge.chat()
    assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")
    assert [seen.body["max_tokens"] for seen in server.requests("POST /v1/tasks")] == [256, 128, 64, 32, 16]


async def test_a_limit_is_kept(server: StandIn, bridge: Bridge) -> None:
    too_long = "the prompt's 500 tokens and max_tokens 100 do not fit into a slot's context of 512; shorten"
    server.on("POST /v1/tasks", s.refuse(400, "INVALID_PARAMS", too_long))
    assert (await bridge.chat(max_tokens=100)).status == 400
    assert task(server)["max_tokens"] == 100


@pytest.mark.parametrize(
    ("fields", "param", "sentence"),
    [
        ({"logprobs": True}, "logprobs", "orchd does not return probabilities"),
        ({"top_logprobs": 2}, "top_logprobs", "orchd does not return probabilities"),
        ({"functions": [{"name": "f"}]}, "functions", "use tools"),
        ({"function_call": "auto"}, "function_call", "use tool_choice"),
        ({"logit_bias": {"1": 5}}, "logit_bias", "leave it out"),
        ({"audio": {"voice": "x"}}, "audio", "no audio"),
        ({"temprature": 0}, "temprature", "did you mean temperature?"),
        ({"temperature": 9}, "temperature", "expected a number from 0 to 5"),
        ({"n": 0}, "n", "expected a whole number from 1 to 16"),
        ({"messages": []}, "messages", "at least one item"),
        (
            {"messages": [{"role": "user", "content": [{"type": 3}]}]},
            "messages[0].content[0].type",
            "expected a string",
        ),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "expected a string or a list"),
        ({"tool_choice": "perhaps"}, "tool_choice", "is not one of auto, none, required"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema.schema is required"),
        ({"model": None}, "model", "expected a string"),
    ],
)
async def test_what_is_not_possible_is_a_400(
    server: StandIn, bridge: Bridge, fields: dict[str, Any], param: str, sentence: str
) -> None:
    answer = await bridge.chat(**fields)
    assert answer.status == 400
    assert sentence in answer.error["message"]
    assert (answer.error["type"], answer.error["param"]) == ("invalid_request_error", param)
    assert server.requests("POST /v1/tasks") == []


async def test_what_clients_send_without_need_changes_nothing(server: StandIn, bridge: Bridge) -> None:
    writing(server, "x")
    ignored = {"user": "me", "store": False, "metadata": {"a": "b"}, "frequency_penalty": 0, "presence_penalty": 0}
    unwanted = {"logprobs": False, "logit_bias": {}, "functions": None, "stop": None, "n": None, "tools": []}
    assert (await bridge.chat(**ignored, **unwanted)).status == 200
    assert task(server).keys() == {"task_id", "pool_id", "messages", "max_tokens", "reasoning"}


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'"x"', b"\xff", b"[" * 100_000, b'{"model": 1}'])
async def test_what_is_no_request_is_a_400(bridge: Bridge, body: bytes) -> None:
    answer = await bridge.request("POST", "/v1/chat/completions", body=body)
    assert (answer.status, answer.error["type"]) == (400, "invalid_request_error")


async def test_a_body_may_not_be_larger_than_the_server_allows(bridge: Bridge) -> None:
    answer = await bridge.chat(messages=[{"role": "user", "content": "x" * (1 << 20)}])
    assert answer.status == 400
    assert "the body is larger than" in answer.error["message"]
