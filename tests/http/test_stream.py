"""``GET /v1/tasks/{id}/stream``: the wire format, listening late, again, together and slowly."""

from __future__ import annotations

import asyncio
import functools
import re
from pathlib import Path
from typing import Any

import pytest

from engines.api import SamplingParams
from orchd.http import sse
from testkit.harness import Event, engine_text, new_id, serving, text_of
from testkit.tiny_gguf import write_tiny_llama
from tests.http.envelope import assert_envelope
from tests.http.listening import hear, raw_stream

EVENT = re.compile(rb"id: (\d+)\nevent: (started|token|end)\ndata: (\{[^\n]*\})\n\n")
UNKNOWN = "00000000-0000-4000-8000-000000000000"


# --- the wire --------------------------------------------------------------------------------------------------------


async def test_wire_format(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path) as server:
        task_id = await server.submit(max_tokens=16)
        answer = await server.request("GET", f"/v1/tasks/{task_id}/stream")
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["Cache-Control"] == "no-store"
    events = EVENT.findall(answer.body)
    assert b"".join(b"id: %b\nevent: %b\ndata: %b\n\n" % event for event in events) == answer.body
    assert [int(number) for number, _, _ in events] == list(range(len(events)))
    assert [kind for _, kind, _ in events] == [b"started", *[b"token"] * (len(events) - 2), b"end"]


async def test_the_three_kinds_of_data(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path) as server:
        accepted = (await server.post(prompt="the", temperature=0, max_tokens=16)).json()
        started, *tokens, end = await server.events(accepted["task_id"])
    assert started.data == {name: accepted[name] for name in ("queue_position", "predicted_start_ms")}
    assert all(set(token.data) == {"t", "i"} for token in tokens)
    assert all(type(token.data["t"]) is str and token.data["t"] for token in tokens)
    indices = [token.data["i"] for token in tokens]
    assert indices == sorted(set(indices))
    assert indices[-1] == 15
    assert set(end.data) == {"tokens_in", "tokens_cached", "tokens_out", "decode_ms", "finish_reason"}
    assert (end.data["tokens_out"], end.data["finish_reason"]) == (16, "length")
    assert type(end.data["decode_ms"]) is int


@pytest.mark.parametrize("prompt", ["the", "the river is", "日本 x 🙂", "<s>and"])
async def test_greedy_text_is_what_the_engine_writes_alone(tiny_model_path: Path, prompt: str) -> None:
    async with serving(tiny_model_path) as server:
        text = text_of(await server.run(prompt=prompt, max_tokens=64))
    assert text == engine_text(tiny_model_path, prompt, max_tokens=64)


async def test_seeded_text_is_what_the_engine_writes_alone(tiny_model_path: Path) -> None:
    params = SamplingParams(temperature=1.5, top_k=80, top_p=0.99, min_p=0.01, repeat_penalty=1.1, seed=42)
    fields = {"temperature": 1.5, "top_k": 80, "top_p": 0.99, "min_p": 0.01, "repeat_penalty": 1.1, "seed": 42}
    async with serving(tiny_model_path) as server:
        text = text_of(await server.run(prompt="the", max_tokens=64, **fields))
    assert text == engine_text(tiny_model_path, "the", max_tokens=64, sampling=params)


async def test_text_is_whole_utf8(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "bytes.gguf", bytes_likely=True)
    async with serving(model) as server:
        tasks = [await server.submit(prompt=word, max_tokens=100) for word in ("the", "river", "hello")]
        answers = [await server.request("GET", f"/v1/tasks/{task}/stream") for task in tasks]
    for answer in answers:
        answer.body.decode("utf-8", "strict")
        assert "�" in answer.body.decode()  # stray bytes, which the model writes, are told as such


# --- late, again, several --------------------------------------------------------------------------------------------


async def test_a_listener_that_comes_late_gets_everything(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path) as server:
        task_id = await server.submit(max_tokens=32)
        server.brake.release()
        first = await server.events(task_id)
        assert await server.events(task_id) == first


async def test_two_listeners_get_the_same(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path) as server:
        server.brake.hold()
        task_id = await server.submit(max_tokens=32)
        async with server.listen(task_id) as one:
            await hear(one, 1)
            server.brake.allow(8)
            await hear(one, 5)
            async with server.listen(task_id) as two:
                server.brake.release()
                rest, everything = [event async for event in one], [event async for event in two]
    assert everything[6:] == rest
    assert [event.id for event in everything] == list(range(34))


@pytest.mark.parametrize("how", ["header", "query"])
async def test_resuming_after_each_event_loses_and_doubles_nothing(tiny_model_path: Path, how: str) -> None:
    async with serving(tiny_model_path) as server:
        task_id = await server.submit(max_tokens=12)
        everything = await server.events(task_id)
        for cut in everything[:-1]:
            if how == "header":
                rest = await server.events(task_id, last=cut.id)
            else:
                rest = await server.events(task_id, path=f"?last_event_id={cut.id}")
            assert everything[: cut.id + 1] + rest == everything


async def test_resuming_while_it_runs_at_every_cut(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path) as server:
        expected = await server.run(prompt="the", max_tokens=12)
        server.brake.hold()
        task_id = await server.submit(max_tokens=12)
        heard: list[Event] = []
        while not heard or heard[-1].kind != "end":
            async with server.listen(task_id, last=heard[-1].id if heard else None) as listener:
                server.brake.allow(1)
                heard += await hear(listener, 1)
    assert [event.id for event in heard] == list(range(len(heard)))
    assert text_of(heard) == text_of(expected)


@pytest.mark.parametrize("last", ["", "x", "-1", "1.5", "0x1", "٣", "9" * 5000, "1 2", "null"])
async def test_an_id_that_is_none_means_from_the_start(tiny_model_path: Path, last: str) -> None:
    async with serving(tiny_model_path) as server:
        task_id = await server.submit(max_tokens=4)
        everything = await server.request("GET", f"/v1/tasks/{task_id}/stream")
        again = await server.request("GET", f"/v1/tasks/{task_id}/stream", headers={"Last-Event-ID": last})
        by_query = await server.request("GET", f"/v1/tasks/{task_id}/stream?last_event_id={last}")
    assert everything.body == again.body == by_query.body


async def test_the_header_beats_the_query_when_event_source_reconnects(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path) as server:
        task_id = await server.submit(max_tokens=4)
        everything = await server.events(task_id)
        assert await server.events(task_id, last=2, path="?last_event_id=0") == everything[3:]


async def test_resuming_after_the_end_is_204(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path) as server:
        task_id = await server.submit(max_tokens=4)
        end = (await server.events(task_id))[-1]
        for last in (end.id, end.id + 1, 999_999):
            answer = await server.request("GET", f"/v1/tasks/{task_id}/stream", headers={"Last-Event-ID": str(last)})
            assert (answer.status, answer.body) == (204, b"")


@pytest.mark.parametrize("task_id", [UNKNOWN, "x", "..%2f..", "%00", "%ED%A0%80", "x" * 5000])
async def test_an_unknown_task_is_404(tiny_model_path: Path, task_id: str) -> None:
    async with serving(tiny_model_path) as server:
        assert_envelope(await server.request("GET", f"/v1/tasks/{task_id}/stream"), 404, "NOT_FOUND")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD"])
async def test_the_wrong_method_is_405(tiny_model_path: Path, method: str) -> None:
    async with serving(tiny_model_path) as server:
        answer = await server.request(method, f"/v1/tasks/{new_id()}/stream")
    assert answer.status == 405
    assert answer.headers["Allow"] == "GET"


# --- while nothing happens -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots_taken", [0, 1], ids=["running", "waiting"])
async def test_a_comment_keeps_the_connection_open(
    tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch, slots_taken: int
) -> None:
    monkeypatch.setattr(sse, "send", functools.partial(sse.send, keep_alive_s=0.05))
    async with serving(tiny_model_path, pool={"slots": 1}) as server:
        server.brake.hold()
        for _ in range(slots_taken):
            await server.submit()
        async with server.listen(await server.submit(max_tokens=4)) as listener:
            while not (block := await listener.block() or "").startswith(":"):
                assert "event: started" in block
            assert await listener.block() == block == ": keep-alive\n"
            server.brake.release()
            events = [event async for event in listener]
        assert events[-1].kind == "end"


async def test_the_answer_begins_before_the_task_does(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path, pool={"slots": 1}) as server:
        server.brake.hold()
        await server.submit()
        async with server.listen(await server.submit()) as listener:
            assert listener.response.status == 200


async def test_fifteen_seconds_are_the_default() -> None:
    assert sse.KEEP_ALIVE_S == 15.0
    assert sse.send.__kwdefaults__ == {"keep_alive_s": 15.0, "progress_s": 0.5}


async def test_comments_tell_how_far_a_long_prompt_is(tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "send", functools.partial(sse.send, progress_s=0.01))
    async with serving(tiny_model_path, pool={"slots": 1, "ctx": 512, "batch": 16}) as server:
        server.brake.hold()
        told: list[tuple[int, int]] = []
        async with server.listen(await server.submit(prompt="the river is " * 50, max_tokens=4)) as listener:
            assert "event: started" in (await listener.block() or "")
            server.brake.allow(1)
            while (block := await listener.block() or "").startswith(": prompt "):
                read, total = block.removeprefix(": prompt ").split("/")
                told.append((int(read), int(total)))
                server.brake.allow(1)
            server.brake.release()
            end = [event async for event in listener][-1].data
    assert len(told) > 2
    assert told == sorted(set(told))
    assert {total for _, total in told} == {end["tokens_in"]}
    assert (end["tokens_cached"], end["finish_reason"]) == (0, "length")


async def test_the_end_tells_how_much_of_the_prompt_was_cached(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path, pool={"slots": 1}) as server:
        cold, warm = [(await server.run(prompt="the river is " * 50, max_tokens=1))[-1].data for _ in range(2)]
    assert cold["tokens_in"] == warm["tokens_in"] > 100
    assert (cold["tokens_cached"], warm["tokens_cached"]) == (0, warm["tokens_in"] - 1)


# --- how it ends -----------------------------------------------------------------------------------------------------


async def test_end_of_generation_is_stop(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "ends.gguf", eog_likely=True)
    async with serving(model) as server:
        ends = [(await server.run(prompt=word))[-1].data for word in ("the", "of", "river", "hello", "small")]
        on = (await server.run(prompt="the", ignore_eos=True, max_tokens=64))[-1].data
    assert {end["finish_reason"] for end in ends} == {"stop"}
    assert (on["finish_reason"], on["tokens_out"]) == ("length", 64)


async def test_stop_strings_never_leak(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path) as server:
        text = text_of(await server.run(max_tokens=48))
        for start in range(2, len(text) - 6, 5):
            stop = text[start : start + 6]  # of several tokens
            events = await server.run(max_tokens=48, stop=["not in it", stop])
            assert text_of(events) == text[: text.index(stop)]
            assert events[-1].data["finish_reason"] == "stop"


async def test_a_beginning_of_a_stop_string_is_sent_once_it_is_none(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path) as server:
        text = text_of(await server.run(max_tokens=48))
        stops = [text[start : start + 4] + "\0" for start in range(0, 40, 7)]
        assert text_of(await server.run(max_tokens=48, stop=stops)) == text


async def test_a_failed_step_is_an_end_with_an_error(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path) as server:
        server.brake.hold()
        task_id = await server.submit()
        async with server.listen(task_id) as listener:
            await hear(listener, 1)
            server.brake.fail("out of luck")
            end = (await hear(listener, 1))[0]
        assert (end.kind, end.data["finish_reason"]) == ("end", "error")
        assert set(end.data) == {"tokens_in", "tokens_cached", "tokens_out", "decode_ms", "finish_reason", "error"}
        error = end.data["error"]
        assert set(error) == {"code", "message", "engine"}
        assert error["code"] == "WORKER_RESET"
        assert "luck" not in error["message"]
        server.brake.release()
        assert (await server.run(max_tokens=4))[-1].data["finish_reason"] == "length"


# --- others are not disturbed ----------------------------------------------------------------------------------------


async def test_a_reader_that_does_not_read_delays_nobody_and_misses_nothing(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path, pool={"ctx": 2048}, send_buffer_bytes=4096) as server:
        server.brake.hold()
        fields: dict[str, Any] = {"max_tokens": 1800}  # some 110 kB of events, more than all buffers take
        slow, quick = await server.submit(**fields), await server.submit(**fields)
        reader, writer = await raw_stream(server, slow, limit=1024)
        await reader.readuntil(b"started")
        server.brake.release()
        assert (await server.events(quick))[-1].data["tokens_out"] == 1800
        everything = await server.request("GET", f"/v1/tasks/{slow}/stream")
        sent = b""
        while not sent.endswith(b"0\r\n\r\n"):  # the last chunk
            sent += await asyncio.wait_for(reader.read(1 << 16), 5)
        writer.close()
        assert sent.count(b"event: token") == everything.body.count(b"event: token") > 1000
        assert sent.count(b"event: end") == 1


async def test_a_stream_that_fails_midway_is_closed_not_garbled(
    tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(response: Any, log: Any, start: int) -> None:
        await response.write(b"id: 0\n")
        raise RuntimeError("a defect")

    monkeypatch.setattr(sse, "send", broken)
    async with serving(tiny_model_path) as server:
        reader, writer = await raw_stream(server, await server.submit())
        sent = await asyncio.wait_for(reader.read(), 5)
        writer.close()
    assert sent.count(b"HTTP/1.1") == 1
    assert b"INTERNAL" not in sent
