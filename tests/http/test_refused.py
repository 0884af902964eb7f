"""``POST /v1/tasks`` with what is no task: it is refused, what is wrong is named, and it takes no place."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from testkit.harness import TOKEN, Answer, Running, serving
from testkit.tiny_gguf import write_tiny_llama
from tests.http.envelope import assert_envelope, places

DEEP = 100_000


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
