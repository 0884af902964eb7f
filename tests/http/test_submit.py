"""``POST /v1/tasks``: what is accepted, what is refused, and that a refusal takes no place."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import uuid
from pathlib import Path
from typing import Any

import pytest
from gguf import TokenType

from engines.llamacpp.chooser import Chooser
from testkit.harness import TOKEN, Answer, Running, new_id, reasoning_of, serving, text_of
from testkit.tiny_gguf import CHATML, FIRST_PIECE, PIECES, write_tiny_llama
from tests.http.envelope import assert_envelope, places

DEEP = 100_000


# --- accepted --------------------------------------------------------------------------------------------------------


async def test_202_has_four_fields(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path) as server:
        answer = await server.post(prompt="the")
    assert answer.status == 202
    assert answer.headers["Content-Type"] == "application/json"
    body = answer.json()
    assert set(body) == {"task_id", "queue_position", "predicted_start_ms", "backoff_ms"}
    assert str(uuid.UUID(body.pop("task_id")))
    assert all(type(figure) is int and figure >= 0 for figure in body.values())


async def test_queue_position_counts_the_tasks_ahead(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path, pool={"slots": 1}, queue={"capacity": 8}) as server:
        server.brake.hold()
        await server.submit()
        await server.started(1)
        batch = [(await server.post(prompt="the", priority="batch")).json() for _ in range(2)]
        interactive = (await server.post(prompt="the")).json()
        late = (await server.post(prompt="the", priority="batch")).json()
    assert [body["queue_position"] for body in batch] == [0, 1]
    assert interactive["queue_position"] == 0
    assert late["queue_position"] == 3
    assert late["predicted_start_ms"] > interactive["predicted_start_ms"]


async def test_backoff_begins_when_the_queue_is_half_full(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path, pool={"slots": 1}, queue={"capacity": 4}) as server:
        server.brake.hold()
        await server.submit()
        await server.started(1)
        backoffs = [(await server.post(prompt="the")).json()["backoff_ms"] for _ in range(4)]
    assert backoffs[0] == 0
    assert 0 < backoffs[2] <= backoffs[3]


async def test_predicted_start_is_now_while_a_slot_is_free(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path) as server:
        assert (await server.post(prompt="the")).json()["predicted_start_ms"] == 0


async def test_task_id_is_the_clients_if_it_gives_one(tiny_model_path: Path) -> None:
    task_id = new_id()
    async with serving(tiny_model_path) as server:
        assert await server.submit(task_id=task_id) == task_id


@pytest.mark.parametrize("spell", [str.upper, lambda text: text.replace("-", "")], ids=["capitals", "no hyphens"])
async def test_task_id_may_be_spelled_in_any_way_a_uuid_is(tiny_model_path: Path, spell: Any) -> None:
    task_id = "0f1e2d3c-4b5a-4968-8776-a5b4c3d2e1f0"
    async with serving(tiny_model_path) as server:
        assert await server.submit(task_id=spell(task_id)) == task_id
        assert (await server.events(spell(task_id)))[-1].kind == "end"


EXTREMES: list[dict[str, Any]] = [
    {"temperature": 5, "top_k": 0, "top_p": 1, "min_p": 0, "repeat_penalty": 10},
    {"temperature": 0.01, "top_k": 2**31 - 1, "top_p": 1e-9, "min_p": 1, "repeat_penalty": 0.1},
    {"seed": 0},
    {"seed": 2**32 - 1, "temperature": 1},
    {"stop": []},
    {"stop": ["x" * 256] * 8},
    {"ignore_eos": True},
    {"engine": "llamacpp", "workload": "completion", "priority": "batch"},
    {"prompt": "the", "task_id": None, "pool_id": None, "model_ref": None, "messages": None, "seed": None},
    {"prompt": "a\0b"},
    {"prompt": "<s><|im_start|>user\n日本語 🙂"},
    {"max_tokens": 1},
]


@pytest.mark.parametrize("fields", EXTREMES, ids=lambda fields: ",".join(fields))
async def test_the_ends_of_every_range_are_valid(tiny_model_path: Path, fields: dict[str, Any]) -> None:
    async with serving(tiny_model_path) as server:
        events = await server.events(await server.submit(**{"max_tokens": 4, "temperature": 0.8, **fields}))
    assert events[-1].data["finish_reason"] in ("length", "stop")
    assert "error" not in events[-1].data


async def test_messages_go_through_the_models_chat_template(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path) as server:
        chat = await server.run(messages=[{"role": "user", "content": "the river"}], max_tokens=12)
        raw = await server.run(prompt="<|im_start|>user\nthe river<|im_end|>\n<|im_start|>assistant\n", max_tokens=12)
    assert text_of(chat) == text_of(raw) != ""


async def test_a_conversation_that_ends_with_the_assistant_is_continued(tiny_model_path: Path) -> None:
    turns = [{"role": "user", "content": "the river"}, {"role": "assistant", "content": "It is"}]
    async with serving(tiny_model_path) as server:
        chat = await server.run(messages=turns, max_tokens=12)
        raw = await server.run(
            prompt="<|im_start|>user\nthe river<|im_end|>\n<|im_start|>assistant\nIt is", max_tokens=12
        )
    assert text_of(chat) == text_of(raw) != ""


THINKING = CHATML + "{% if not enable_thinking %}{{ effort }}</think>{% endif %}"
ASKED = [{"role": "user", "content": "the river"}]


async def test_the_models_template_gets_the_tasks_variables(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "thinks.gguf", chat_template=THINKING)
    arguments = {"enable_thinking": False, "effort": "low"}
    async with serving(model) as server:
        chat = await server.run(messages=ASKED, chat_template_kwargs=arguments, max_tokens=12)
        raw = await server.run(
            prompt="<|im_start|>user\nthe river<|im_end|>\n<|im_start|>assistant\nlow</think>", max_tokens=12
        )
        other = await server.run(messages=ASKED, max_tokens=12)
    assert text_of(chat) == text_of(raw) != text_of(other)


THINKS = CHATML.replace("assistant\n'", "assistant\n<think>\n'") + "{% set history = '</think>' %}"


@pytest.mark.parametrize("wanted", [True, False])
async def test_a_task_gets_the_reasoning_that_it_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: bool
) -> None:
    markers = dict.fromkeys(("<think>", "</think>"), TokenType.USER_DEFINED)
    model = write_tiny_llama(tmp_path / "thinks.gguf", more=markers, chat_template=THINKS)
    a, close, b = FIRST_PIECE + PIECES.index("a"), FIRST_PIECE + len(PIECES) + 1, FIRST_PIECE + PIECES.index("b")
    script = iter([a, a, close, b, b])
    monkeypatch.setattr(Chooser, "choose", lambda self, logits, samplers, allowed: [next(script)])
    async with serving(model) as server:
        asked = {"reasoning": True} if wanted else {}
        started, *tokens, end = await server.run(messages=ASKED, max_tokens=5, **asked)
    assert [event.kind for event in (started, *tokens, end)] == ["started", *["token"] * len(tokens), "end"]
    thoughts = [{"r": "a", "i": 0}, {"r": "a", "i": 1}] if wanted else []
    assert [token.data for token in tokens] == [*thoughts, {"t": "b", "i": 3}, {"t": "b", "i": 4}]
    assert (end.data["tokens_out"], end.data["finish_reason"]) == (5, "length")


async def test_a_prompt_is_all_answer_whether_reasoning_is_asked_for_or_not(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "thinks.gguf", chat_template=THINKS)
    async with serving(model) as server:
        plain = await server.run(prompt="<think>the", max_tokens=8)
        asked = await server.run(prompt="<think>the", max_tokens=8, reasoning=True)
    assert text_of(asked) == text_of(plain) != ""
    assert reasoning_of(asked) == ""


async def test_the_tasks_variables_are_part_of_what_a_retry_repeats(tiny_model_path: Path) -> None:
    task: dict[str, Any] = {"task_id": new_id(), "messages": ASKED}
    async with serving(tiny_model_path) as server:
        first = await server.post(**task, chat_template_kwargs={"a": 1, "b": False})
        assert first.status == 202
        again = await server.post(**task, chat_template_kwargs={"b": False, "a": 1})
        assert (again.status, again.json()) == (202, first.json())
        assert_envelope(await server.post(**task, chat_template_kwargs={"a": 1, "b": True}), 400, "INVALID_PARAMS")
        assert_envelope(await server.post(**task), 400, "INVALID_PARAMS")


async def test_without_a_seed_the_task_id_is_the_seed(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path) as one, serving(tiny_model_path) as other:
        task_id = new_id()
        same = [text_of(await s.run(task_id=task_id, temperature=1, max_tokens=16)) for s in (one, other)]
        another = text_of(await one.run(task_id=new_id(), temperature=1, max_tokens=16))
    assert same[0] == same[1] != another


# --- refused ---------------------------------------------------------------------------------------------------------

BAD_BODIES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not JSON"),
    "blank": (b" \n", "not JSON"),
    "truncated": (b'{"prompt": "a', "not JSON"),
    "two values": (b'{"prompt":"a"} {}', "not JSON"),
    "form data": (b"prompt=a", "not JSON"),
    "byte order mark": (b'\xef\xbb\xbf{"prompt":"a"}', "not JSON"),
    "not UTF-8": (b'{"prompt":"a\xff"}', "UTF-8"),
    "UTF-16": ('{"prompt":"a"}'.encode("utf-16"), "not JSON"),
    "surrogate, written as bytes": (b'{"prompt":"\xed\xa0\x80"}', "UTF-8"),
    "half a surrogate pair": (b'{"prompt":"\\ud83d"}', "not JSON"),
    "the other half": (b'{"prompt":"\\ude42"}', "not JSON"),
    "half a surrogate pair in a name": (b'{"\\ud83d":1}', "not JSON"),
    "array": (b'[{"prompt":"a"}]', "object"),
    "null": (b"null", "object"),
    "string": (b'"prompt"', "object"),
    "deep arrays": (b"[" * DEEP, "object"),
    "deep objects": (b'{"prompt":' * DEEP, "prompt"),
    "deep in an unknown field": (b'{"prompt":"a","x":' + b"[" * DEEP, "x"),
    "deep in messages": (b'{"messages":' + b"[" * DEEP, "messages"),
    "NaN": (b'{"prompt":"a","temperature":NaN}', "not JSON"),
    "Infinity": (b'{"prompt":"a","top_p":Infinity}', "not JSON"),
    "-Infinity": (b'{"prompt":"a","min_p":-Infinity}', "not JSON"),
    "beyond a double": (b'{"prompt":"a","temperature":1e999}', "temperature"),
    "an int of 5000 digits": (b'{"prompt":"a","max_tokens":' + b"9" * 5000 + b"}", "max_tokens"),
    "a float of 5000 digits": (b'{"prompt":"a","temperature":' + b"9" * 5000 + b"}", "temperature"),
    "a long unknown name": (b'{"prompt":"a","' + b"x" * 9000 + b'":1}', "unknown field"),
    "a long value": (b'{"prompt":"a","priority":"' + b"x" * 9000 + b'"}', "priority"),
    "a long pool": (b'{"prompt":"a","pool_id":"' + b"x" * 9000 + b'"}', "pool"),
}

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}]}


def chat(**arguments: Any) -> dict[str, Any]:
    return {**CHAT, "chat_template_kwargs": arguments}


BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt, messages: exactly one"),
    ({"prompt": ""}, "prompt: expected a string of at least one character"),
    ({"prompt": 1}, "prompt: expected a string"),
    ({"prompt": ["a"]}, "prompt"),
    ({"prompt": "a", "promt": "a"}, "promt; did you mean prompt"),
    ({"prompt": "a", "policy_label": "x"}, "policy_label; available: task_id, pool_id"),
    ({"prompt": "a", "deadline_ms": 5}, "deadline_ms"),
    ({"prompt": "a", "Max_Tokens": 5}, "Max_Tokens; did you mean max_tokens"),
    ({"messages": []}, "messages"),
    ({"messages": "a"}, "messages"),
    ({"messages": ["a"]}, "messages[0]: expected an object"),
    (
        {"messages": [{"role": "user", "content": "a", "x": 1}]},
        "messages[0]: unknown field x; available: role, content",
    ),
    ({"messages": [{"role": "user"}]}, "messages[0]: content is required"),
    ({"messages": [{"content": "a"}]}, "messages[0]: role is required"),
    (
        {"messages": [{"role": "root", "content": "a"}]},
        "messages[0].role: 'root' is not one of assistant, system, tool, user",
    ),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, "name"),
    ({"prompt": "a", "chat_template_kwargs": {}}, "chat_template_kwargs: a prompt goes through no chat template"),
    (chat(x={"y": 1}), "chat_template_kwargs: expected an object of up to 16 values, each true, false, a number"),
    (chat(x=[1]), "chat_template_kwargs: expected an object"),
    (chat(x=None), "chat_template_kwargs: expected an object"),
    (chat(x="y" * 257), "chat_template_kwargs: expected an object"),
    (chat(x=2**53 + 1), "chat_template_kwargs: expected an object"),
    (chat(**{f"x{n}": n for n in range(17)}), "chat_template_kwargs: expected an object"),
    (chat(messages="x"), "chat_template_kwargs: messages is set by the server"),
    (chat(bos_token="x"), "chat_template_kwargs: bos_token is set by the server"),
    (chat(**{"a b": 1}), "chat_template_kwargs: 'a b' cannot be the name of a variable"),
    (chat(**{"x" * 65: 1}), "cannot be the name of a variable"),
    ({"messages": CHAT["messages"], "chat_template_kwargs": [1]}, "chat_template_kwargs: expected an object"),
    ({**CHAT, "reasoning": "yes"}, "reasoning: expected"),
    ({"prompt": "a", "reasoning": 1}, "reasoning"),
    ({"prompt": "a", "reasoning": None}, "reasoning"),
    ({"prompt": "a", "task_id": "1"}, "task_id: expected a UUID such as"),
    ({"prompt": "a", "task_id": 1}, "task_id"),
    ({"prompt": "a", "task_id": ""}, "task_id"),
    ({"prompt": "a", "task_id": "../../etc/passwd"}, "task_id"),
    ({"prompt": "a", "pool_id": "nope"}, "pool_id: there is no pool 'nope'; available: default"),
    ({"prompt": "a", "pool_id": 1}, "pool_id"),
    ({"prompt": "a", "pool_id": ""}, "pool"),
    ({"prompt": "a", "model_ref": 1}, "model_ref"),
    ({"prompt": "a", "engine": "vllm"}, "engine: 'vllm' is not one of llamacpp"),
    ({"prompt": "a", "workload": "embedding"}, "workload: 'embedding' is not one of completion"),
    ({"prompt": "a", "priority": "low"}, "priority: 'low' is not one of interactive, batch"),
    ({"prompt": "a", "priority": 1}, "priority"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens: expected a whole number from 1 to 2147483647"),
    ({"prompt": "a", "max_tokens": -1}, "max_tokens"),
    ({"prompt": "a", "max_tokens": 1.5}, "max_tokens"),
    ({"prompt": "a", "max_tokens": "5"}, "max_tokens"),
    ({"prompt": "a", "max_tokens": True}, "max_tokens"),
    ({"prompt": "a", "max_tokens": None}, "max_tokens"),
    ({"prompt": "a", "max_tokens": 2**31}, "max_tokens"),
    ({"prompt": "a", "max_tokens": 2**64}, "max_tokens"),
    ({"prompt": "a", "stop": "x"}, "stop"),
    ({"prompt": "a", "stop": [""]}, "stop[0]"),
    ({"prompt": "a", "stop": ["x", 1]}, "stop[1]"),
    ({"prompt": "a", "stop": ["x"] * 9}, "stop"),
    ({"prompt": "a", "stop": ["x" * 257]}, "stop[0]"),
    ({"prompt": "a", "stop": None}, "stop"),
    ({"prompt": "a", "seed": -1}, "seed"),
    ({"prompt": "a", "seed": 2**32}, "seed"),
    ({"prompt": "a", "seed": True}, "seed"),
    ({"prompt": "a", "temperature": -0.1}, "temperature"),
    ({"prompt": "a", "temperature": 5.1}, "temperature"),
    ({"prompt": "a", "temperature": "hot"}, "temperature"),
    ({"prompt": "a", "temperature": True}, "temperature"),
    ({"prompt": "a", "top_k": -1}, "top_k"),
    ({"prompt": "a", "top_k": 2**31}, "top_k"),
    ({"prompt": "a", "top_p": 0}, "top_p: expected a number above 0, at most 1"),
    ({"prompt": "a", "top_p": 1.1}, "top_p"),
    ({"prompt": "a", "min_p": -0.1}, "min_p"),
    ({"prompt": "a", "min_p": 1.1}, "min_p"),
    ({"prompt": "a", "repeat_penalty": 0}, "repeat_penalty"),
    ({"prompt": "a", "repeat_penalty": 10.1}, "repeat_penalty"),
    ({"prompt": "a", "ignore_eos": 1}, "ignore_eos"),
    ({"prompt": "a", "ignore_eos": "true"}, "ignore_eos"),
]


@pytest.mark.parametrize(("body", "named"), BAD_BODIES.values(), ids=BAD_BODIES)
async def test_a_body_that_is_no_task_takes_no_place(tiny_model_path: Path, body: bytes, named: str) -> None:
    async with serving(tiny_model_path) as server:
        await _assert_refused(server, await server.post(body), named)


@pytest.mark.parametrize(("fields", "named"), BAD_FIELDS, ids=lambda part: str(part)[:60])
async def test_a_bad_field_is_named_and_takes_no_place(
    tiny_model_path: Path, fields: dict[str, Any], named: str
) -> None:
    async with serving(tiny_model_path) as server:
        await _assert_refused(server, await server.post(json.dumps(fields).encode()), named)


async def _assert_refused(server: Running, answer: Answer, named: str) -> None:
    message = assert_envelope(answer, 400, "INVALID_PARAMS")
    assert named in message
    assert not any((await places(server)).values())
    assert await server.total("tasks_rejected_total") == 1
    assert await server.total("tasks_rejected_total", reason="INVALID_PARAMS") == 1
    assert await server.busy() == 0


async def test_a_prompt_that_does_not_fit_is_told_all_three_numbers(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path) as server:
        fits = await server.post(prompt="the the the", max_tokens=512 - 4)
        answer = await server.post(prompt="the the the", max_tokens=512 - 3)
        assert fits.status == 202
    message = assert_envelope(answer, 400, "INVALID_PARAMS")
    assert re.findall(r"\d+", message) == ["4", "509", "512"]


async def test_a_nul_does_not_end_the_prompt(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path) as server:
        answer = await server.post(prompt="a\0" + "the " * 40, max_tokens=512)
    assert int(re.findall(r"\d+", assert_envelope(answer, 400, "INVALID_PARAMS"))[0]) > 40


async def test_a_long_prompt_is_refused_like_a_short_one(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path) as server:
        await _assert_refused(server, await server.post(prompt="the " * 100_000), "do not fit")


async def test_a_body_may_have_max_body_bytes_and_no_more(tiny_model_path: Path) -> None:
    body = b'{"prompt":"the"'
    async with serving(tiny_model_path, server={"max_body_bytes": 2048}) as server:
        largest = await server.post(body + b" " * (2048 - len(body) - 1) + b"}")
        assert largest.status == 202
        await server.events(largest.json()["task_id"])
        message = assert_envelope(await server.post(body + b" " * (2048 - len(body)) + b"}"), 400, "INVALID_PARAMS")
        assert "2048" in message
        assert await server.total("tasks_rejected_total") == 1


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "GZIP", "identity, gzip", "nonsense"])
@pytest.mark.parametrize("path", ["/v1/tasks", "/v1/pools/default/reload"])
async def test_a_body_with_a_content_encoding_is_refused_as_it_is(
    tiny_model_path: Path, encoding: str, path: str
) -> None:
    async with serving(tiny_model_path) as server:
        answer = await server.request("POST", path, body=b'{"prompt":"a"}', headers={"Content-Encoding": encoding})
        message = assert_envelope(answer, 400, "INVALID_PARAMS")
        assert message == "the body is compressed; send it without Content-Encoding"
        assert not any((await places(server)).values())


@pytest.mark.parametrize("token", [TOKEN, "not-the-token"])
async def test_nothing_is_ever_decompressed(tiny_model_path: Path, token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "aiohttp.http_parser.DeflateBuffer.__init__", lambda *_, **__: pytest.fail("it is decompressed")
    )
    bomb = gzip.compress(b" " * (64 << 20))
    async with serving(tiny_model_path) as server:
        answer = await server.request("POST", "/v1/tasks", body=bomb, headers={"Content-Encoding": "gzip"}, token=token)
        assert answer.status == (400 if token == TOKEN else 401)


@pytest.mark.parametrize("encoding", ["identity", "Identity", ""])
async def test_a_body_may_say_that_it_is_not_encoded(tiny_model_path: Path, encoding: str) -> None:
    async with serving(tiny_model_path) as server:
        answer = await server.request(
            "POST", "/v1/tasks", body=b'{"prompt":"a"}', headers={"Content-Encoding": encoding}
        )
        assert answer.status == 202


async def test_a_model_without_a_chat_template_refuses_messages(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "bare.gguf", chat_template=None)
    async with serving(model) as server:
        answer = await server.post(messages=[{"role": "user", "content": "a"}])
        await _assert_refused(server, answer, "send prompt")


@pytest.mark.parametrize(
    ("template", "message", "cause"),
    [
        ("{{ messages.secret.more }}", "fails on these messages; send prompt instead", "has no attribute 'secret'"),
        ("{% secret %}", "cannot be used; send prompt instead", "unknown tag 'secret'"),
    ],
)
async def test_a_template_that_fails_is_told_without_its_error(
    tmp_path: Path, template: str, message: str, cause: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = write_tiny_llama(tmp_path / "odd.gguf", chat_template=template)
    async with serving(model) as server:
        answer = await server.post(messages=[{"role": "user", "content": "a"}])
        assert assert_envelope(answer, 400, "INVALID_PARAMS") == f"the model's chat template {message}"
    assert cause in caplog.text


async def test_a_defect_is_a_500_that_counts_as_rejected(
    tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchd.service.Service.submit", lambda *_: 1 / 0)
    async with serving(tiny_model_path) as server:
        message = assert_envelope(await server.post(prompt="a"), 500, "INTERNAL")
        assert "division" not in message
        assert await server.total("tasks_rejected_total", reason="INTERNAL") == 1


# --- the same id again -----------------------------------------------------------------------------------------------


async def test_the_same_request_again_gets_the_first_answer(tiny_model_path: Path) -> None:
    task: dict[str, Any] = {"task_id": new_id(), "prompt": "the", "temperature": 0}
    async with serving(tiny_model_path, pool={"slots": 1}) as server:
        server.brake.hold()
        await server.submit()
        await server.started(1)
        first = await server.post(**task)
        last = await server.submit()
        again = await server.post(**task)
        reordered = await server.post(**dict(reversed(task.items())), max_tokens=256)  # the default, written out
        server.brake.release()
        await server.events(last)
        after = await server.post(**task)
        assert await server.total("tasks_enqueued_total") == 3
        assert await server.total("tasks_rejected_total") == 0
    assert (again.status, reordered.status, after.status) == (202, 202, 202)
    assert first.body == again.body == reordered.body == after.body


async def test_the_same_id_with_another_request_is_refused(tiny_model_path: Path) -> None:
    task_id = new_id()
    async with serving(tiny_model_path) as server:
        await server.submit(task_id=task_id)
        assert "a different request" in assert_envelope(
            await server.post(task_id=task_id, prompt="other"), 400, "INVALID_PARAMS"
        )
        assert await server.total("tasks_rejected_total") == 1


async def test_the_same_request_twice_at_once_is_one_task(tiny_model_path: Path) -> None:
    task: dict[str, Any] = {"task_id": new_id(), "prompt": "the " * 200, "temperature": 0, "max_tokens": 8}
    async with serving(tiny_model_path) as server:
        answers = await asyncio.gather(*(server.post(**task) for _ in range(8)))
        await server.events(task["task_id"])
        assert await server.total("tasks_enqueued_total") == 1
    assert {answer.status for answer in answers} == {202}
    assert len({answer.body for answer in answers}) == 1
