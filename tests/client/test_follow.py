"""Following a task with the client: events, broken streams taken up again, leaving."""

from __future__ import annotations

import asyncio
import gc
import time
from contextlib import aclosing

import pytest

from engines.api import FinishReason
from orchd import client as orchd_client
from orchd.client import Client, End, Event, Reasoning, Started, Token
from testkit import stand_in as s
from testkit.stand_in import StandIn
from tests.client.connect import connect, texts


async def followed(client: Client, *, last_event_id: str | None = None) -> list[Event]:
    return [event async for event in client.follow("t", last_event_id=last_event_id)]


async def test_follow_yields_typed_events_and_stops_after_the_end(server: StandIn) -> None:
    server.on("GET stream", s.stream(b": wait\n\n", s.started(), s.token(1, "né"), s.end(2), then="stay"))
    async with connect(server) as client:
        events = await followed(client)
    assert events == [
        Started(queue_position=0, predicted_start_ms=0, event_id="0"),
        Token(t="né", i=0, event_id="1"),
        End(tokens_in=5, tokens_cached=2, tokens_out=1, decode_ms=12, finish_reason=FinishReason.STOP, event_id="2"),
    ]
    assert await asyncio.to_thread(server.left.wait, 5)


async def test_follow_tells_how_far_a_long_prompt_is(server: StandIn) -> None:
    comments = (b": keep-alive\n\n", b": prompt 3/9\n\n", b": prompt 9\n\n", b": prompt x/9\n\n", b": prompt 6/9\n\n")
    server.on("GET stream", s.stream(s.started(), *comments, s.token(1, "a"), s.end(2)))
    told: list[tuple[int, int]] = []
    async with connect(server) as client:
        async for _ in client.follow("t", on_prompt=lambda read, total: told.append((read, total))):
            pass
    assert told == [(3, 9), (6, 9)]


async def test_reasoning_is_an_event_of_its_own(server: StandIn) -> None:
    server.on("POST /v1/tasks", s.accept())
    server.on("GET stream", s.stream(s.started(), s.reasoning(1, "hm"), s.token(2, "né"), s.end(3)))
    async with connect(server) as client:
        accepted = await client.submit(messages=[{"role": "user", "content": "hi"}], reasoning=True)
        events = [event async for event in client.follow(accepted.task_id)]
        answer = await texts(client, reasoning=True)
    assert server.seen[0].body["reasoning"] is True
    assert events[1:3] == [Reasoning(r="hm", i=0, event_id="1"), Token(t="né", i=1, event_id="2")]
    assert [event.text for event in events if isinstance(event, Reasoning)] == ["hm"]
    assert answer == "né"


@pytest.mark.parametrize("how", ["cut", "close"])
async def test_a_broken_stream_is_taken_up_after_the_last_event(server: StandIn, how: str) -> None:
    half = s.token(2, "b")[:-1]  # its blank line is missing
    server.on(
        "GET stream",
        s.stream(s.started(), s.token(1, "a"), half, then=how),
        s.drop,
        s.stream(s.token(2, "b"), s.end(3)),
    )
    async with connect(server) as client:
        events = await followed(client)
    assert [event.event_id for event in events] == ["0", "1", "2", "3"]
    assert [seen.headers.get("Last-Event-ID") for seen in server.seen] == [None, "1", "1"]
    assert not any(seen.query for seen in server.seen)  # what breaks is no wish to cancel


async def test_tries_are_counted_anew_after_progress(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchd.client.streams._RESUME_PAUSES_S", (0.0, 0.0))
    server.on("GET stream", *(s.stream(s.token(n, "x"), then="cut") for n in range(1, 9)), s.stream(s.end(9)))
    async with connect(server) as client:
        assert len(await followed(client)) == 9


async def test_a_stream_that_cannot_be_taken_up_ends_in_an_error(
    server: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchd.client.streams._RESUME_PAUSES_S", (0.0, 0.0))
    server.on("GET stream", s.stream(s.started(), then="cut"), s.drop)
    async with connect(server) as client:
        with pytest.raises(orchd_client.NotReachable, match="could not be resumed"):
            await followed(client)
    assert len(server.seen) <= 5  # three tries, of which aiohttp repeats two on a new connection


async def test_following_resumes_where_it_is_told_and_204_ends_it(server: StandIn) -> None:
    server.on("GET stream", s.raw(b"", status=204))
    async with connect(server) as client:
        assert await followed(client, last_event_id="65") == []
    assert server.seen[0].headers["Last-Event-ID"] == "65"


async def test_a_task_that_is_gone_is_not_found(server: StandIn) -> None:
    server.on("GET stream", s.stream(s.started(), then="cut"), s.refuse(404, "NOT_FOUND", "No such task."))
    async with connect(server) as client:
        with pytest.raises(orchd_client.NotFound):
            await followed(client)


@pytest.mark.parametrize(
    "garbage",
    [
        s.raw(b"<html>"),
        s.stream(b"event: token\ndata: {\n\n"),
        s.stream(b'event: token\ndata: {"t": 5}\n\n'),
        s.stream(b'event: token\ndata: {"i": 5}\n\n'),
        s.stream(b"data: " + b"x" * (2 << 20)),
    ],
)
async def test_a_stream_that_is_not_orchds_is_named_as_such(server: StandIn, garbage: s.Step) -> None:
    server.on("GET stream", garbage)
    async with connect(server) as client:
        with pytest.raises(orchd_client.BadAnswer):
            await followed(client)


async def test_an_event_type_nobody_knows_is_left_out(server: StandIn) -> None:
    server.on("GET stream", s.stream(s.event(0, "news", {}), s.end(1)))
    async with connect(server) as client:
        assert [type(event) for event in await followed(client)] == [End]


@pytest.mark.parametrize("how", ["break", "aclosing", "cancel"])
async def test_leaving_early_closes_the_connection(server: StandIn, how: str) -> None:
    server.on("GET stream", s.stream(s.started(), s.token(1, "a"), then="stay"))
    async with connect(server) as client:
        if how == "break":
            async for _ in client.follow("t"):
                break
            gc.collect()
        elif how == "aclosing":
            async with aclosing(client.follow("t")) as events:
                await anext(events)
        else:
            task = asyncio.create_task(followed(client))
            assert await asyncio.to_thread(server.arrived.wait, 5)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert await asyncio.to_thread(server.left.wait, 5)
    streams = server.requests("GET stream")
    assert [seen.query for seen in streams] == [{}, {"cancel_grace_s": "0"}]


async def test_leaving_after_the_end_says_nothing(server: StandIn) -> None:
    server.on("GET stream", s.stream(s.started(), s.end(1)))
    async with connect(server) as client, aclosing(client.follow("t")) as events:
        assert [await anext(events) for _ in range(2)]
    assert len(server.seen) == 1


async def test_leaving_a_server_that_does_not_answer_takes_a_second_at_most(server: StandIn) -> None:
    server.on("GET stream", s.stream(s.started(), then="stay"), s.silent)
    async with connect(server) as client:
        async with aclosing(client.follow("t")) as events:
            await anext(events)
            began = time.monotonic()
        assert time.monotonic() - began < 3
