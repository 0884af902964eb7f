"""Completions of plain text, and names of models, over a server that answers as scripted."""

from __future__ import annotations

from typing import Any

import pytest

from testkit import stand_in as s
from testkit.bridge import Bridge
from testkit.stand_in import StandIn
from tests.openai.script import task, writing


async def test_a_whole_answer(server: StandIn, bridge: Bridge) -> None:
    writing(server, " riv", "er")
    body = (await bridge.complete()).json()
    assert (body["object"], body["model"]) == ("text_completion", "tiny-llama")
    assert body["choices"] == [{"index": 0, "text": " river", "finish_reason": "stop", "logprobs": None}]
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (7, 2)
    assert task(server)["prompt"] == "the"
    assert task(server)["max_tokens"] == 16  # OpenAI's default
    assert "reasoning" not in task(server)


async def test_a_streamed_answer(server: StandIn, bridge: Bridge) -> None:
    writing(server, " riv", "er", reason="length")
    chunks = (await bridge.complete(stream=True, stream_options={"include_usage": True}, echo=True)).chunks()
    assert [choice["text"] for chunk in chunks for choice in chunk["choices"]] == ["the", " riv", "er", ""]
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["usage"]["total_tokens"] == 9


async def test_each_prompt_has_its_choices(server: StandIn, bridge: Bridge) -> None:
    writing(server, "x")
    body = (await bridge.complete(prompt=["a", "b"], n=2, echo=True, seed=1, max_tokens=3)).json()
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [
        (0, "ax"),
        (1, "ax"),
        (2, "bx"),
        (3, "bx"),
    ]
    assert body["usage"]["prompt_tokens"] == 14
    asked = sorted((seen.body["prompt"], seen.body["seed"]) for seen in server.requests("POST /v1/tasks"))
    assert asked == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"prompt": [1, 2]}, "prompt[0]: expected a string"),
        ({"suffix": "x"}, "suffix: not available"),
        ({"logprobs": 5}, "logprobs: orchd does not return probabilities"),
        ({"messages": []}, "unknown field messages"),
    ],
)
async def test_what_is_not_possible_is_a_400(bridge: Bridge, fields: dict[str, Any], sentence: str) -> None:
    answer = await bridge.complete(**fields)
    assert answer.status == 400
    assert answer.error["message"].startswith(sentence)


async def test_models_are_those_of_the_server_and_its_pools(server: StandIn, bridge: Bridge) -> None:
    body = (await bridge.request("GET", "/v1/models")).json()
    assert body["object"] == "list"
    assert [model["id"] for model in body["data"]] == ["tiny-llama", "default"]
    assert all((model["object"], model["owned_by"]) == ("model", "orchd") for model in body["data"])
    assert (await bridge.request("GET", "/v1/models/default")).json() == body["data"][1]
    assert (await bridge.request("GET", "/v1/models/gpt-4o")).error["code"] == "model_not_found"


async def test_a_model_that_was_reloaded_is_found_at_once(server: StandIn, bridge: Bridge) -> None:
    writing(server, "x")
    assert (await bridge.complete(model="tiny-llama")).status == 200
    server.script["GET /health"].clear()
    server.on("GET /health", s.answer(s.health_body(model_id="other")))
    assert (await bridge.complete(model="other")).status == 200


async def test_the_server_is_not_asked_for_its_models_each_time(server: StandIn, bridge: Bridge) -> None:
    writing(server, "x")
    for _ in range(5):
        assert (await bridge.complete()).status == 200
    assert len(server.requests("GET /health")) == 1
