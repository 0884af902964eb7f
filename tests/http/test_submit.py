"""``POST /v1/tasks``: what is accepted, and what the same request again gets."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path
from typing import Any

import pytest
from gguf import TokenType

from engines.llamacpp.chooser import Chooser
from testkit.harness import new_id, reasoning_of, serving, text_of
from testkit.tiny_gguf import CHATML, FIRST_PIECE, PIECES, write_tiny_llama
from tests.http.envelope import assert_envelope

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
