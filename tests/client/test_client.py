"""The client, against a server that answers as scripted."""

from __future__ import annotations

import asyncio
import logging
import socket
import uuid
from pathlib import Path

import pytest

from orchd import client as orchd_client
from orchd.client import Client
from orchd.errors import ConfigError
from testkit import stand_in as s
from testkit.stand_in import TOKEN, StandIn
from tests.client.connect import connect, texts

# Submit


async def test_submit_makes_a_task_id_and_sends_what_was_given_and_no_more(server: StandIn) -> None:
    server.on("POST /v1/tasks", s.accept(queue_position=3, predicted_start_ms=40))
    async with connect(server) as client:
        accepted = await client.submit(prompt="hi", max_tokens=5, priority="batch", seed=None)
    assert (accepted.queue_position, accepted.predicted_start_ms) == (3, 40)
    assert uuid.UUID(accepted.task_id)
    [seen] = server.seen
    assert seen.body == {"prompt": "hi", "max_tokens": 5, "priority": "batch", "task_id": accepted.task_id}


async def test_a_submit_whose_answer_is_lost_is_sent_again_under_the_same_id(server: StandIn) -> None:
    server.on("POST /v1/tasks", s.drop, s.accept())
    async with connect(server) as client:
        await client.submit(prompt="hi")
    first, second = server.seen
    assert first.body == second.body


async def test_a_full_queue_raises_at_once_by_default(server: StandIn) -> None:
    server.on(
        "POST /v1/tasks",
        s.refuse(429, "ADMISSION_REJECT", "Full.", {"X-Backoff-Ms": "250", "Retry-After": "1"}),
    )
    async with connect(server) as client:
        with pytest.raises(orchd_client.Busy, match="Full") as caught:
            await client.submit(prompt="hi")
    assert (caught.value.backoff_ms, caught.value.retry_after_s, caught.value.pause_s) == (250, 1, 0.25)
    assert len(server.seen) == 1


@pytest.mark.parametrize(
    "refusal",
    [
        s.refuse(429, "ADMISSION_REJECT", "Full.", {"X-Backoff-Ms": "20", "Retry-After": "1"}),
        s.refuse(503, "POOL_UNREADY", "Loading.", {"Retry-After": "0"}),
    ],
)
async def test_a_pause_that_the_server_asks_for_is_waited_out(server: StandIn, refusal: s.Step) -> None:
    server.on("POST /v1/tasks", refusal, refusal, s.accept())
    pauses: list[float] = []
    async with connect(server) as client:
        await client.submit(prompt="hi", max_wait_s=30, on_wait=lambda refused, pause_s: pauses.append(pause_s))
    assert len(pauses) == 2
    assert len({seen.body["task_id"] for seen in server.seen}) == 1


async def test_where_the_server_asks_for_longer_than_the_limit_one_last_try_is_made_at_its_end(
    server: StandIn,
) -> None:
    refusal = s.refuse(503, "POOL_UNREADY", "Loading.", {"Retry-After": "60"})
    pauses: list[float] = []
    async with connect(server) as client:
        server.on("POST /v1/tasks", refusal, s.accept(), refusal, refusal)
        await client.submit(prompt="hi", max_wait_s=0.05, on_wait=lambda refused, pause_s: pauses.append(pause_s))
        assert [pytest.approx(0.05, abs=0.05)] == pauses
        with pytest.raises(orchd_client.NotReady):
            await client.submit(prompt="hi", max_wait_s=0.05)
    assert len(server.seen) == 4


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (400, "INVALID_PARAMS", orchd_client.InvalidRequest),
        (401, "UNAUTHORIZED", orchd_client.Unauthorized),
        (403, "FORBIDDEN", orchd_client.Forbidden),
        (429, "ADMISSION_REJECT", orchd_client.Busy),
        (500, "INTERNAL", orchd_client.Refused),
        (503, "POOL_UNAVAILABLE", orchd_client.NotReady),
    ],
)
async def test_each_refusal_has_its_type(
    server: StandIn, status: int, code: str, kind: type[orchd_client.Refused]
) -> None:
    server.on("POST /v1/tasks", s.refuse(status, code, "No."))
    async with connect(server) as client:
        with pytest.raises(kind) as caught:
            await client.submit(prompt="hi")
    assert (caught.value.status, caught.value.code, str(caught.value)) == (status, code, "No.")


async def test_nobody_listening_is_not_reachable() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        async with Client(f"http://127.0.0.1:{taken.getsockname()[1]}", token=TOKEN) as client:
            with pytest.raises(orchd_client.NotReachable, match=r"connection refused.*orchd serve"):
                await client.health()


async def test_a_server_that_always_drops_is_not_reachable(server: StandIn) -> None:
    server.on("POST /v1/tasks", s.drop)
    async with connect(server) as client:
        with pytest.raises(orchd_client.NotReachable):
            await client.submit(prompt="hi")
    assert len(server.seen) == 4


@pytest.mark.parametrize(
    "garbage",
    [s.raw(b"<html>"), s.raw(b"<html>", status=502), s.answer({"hello": 1}), s.answer([], status=202)],
)
async def test_something_that_is_not_orchd_is_named_as_such(server: StandIn, garbage: s.Step) -> None:
    server.on("POST /v1/tasks", garbage)
    async with connect(server) as client:
        with pytest.raises(orchd_client.BadAnswer, match="does not answer like orchd"):
            await client.submit(prompt="hi")


async def test_what_does_not_speak_http_is_named_as_such() -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b"220 mail.example ESMTP\r\n\r\n")
        writer.close()

    smtp = await asyncio.start_server(greet, "127.0.0.1", 0)
    async with smtp, Client(f"http://127.0.0.1:{smtp.sockets[0].getsockname()[1]}", token=TOKEN) as client:
        with pytest.raises(orchd_client.BadAnswer) as caught:
            await client.health()
    assert caught.value.__cause__ is None


async def test_a_redirect_is_not_followed(server: StandIn) -> None:
    server.on("GET /health", s.answer({}, status=307, headers={"Location": "/elsewhere"}))
    async with connect(server) as client:
        with pytest.raises(orchd_client.BadAnswer, match="307"):
            await client.health()
    assert [seen.route for seen in server.seen] == ["GET /health"]


# Run, health, reload


async def test_run_yields_the_text(server: StandIn) -> None:
    server.on("POST /v1/tasks", s.accept())
    server.on("GET stream", s.stream(s.started(), s.token(1, " fox"), s.token(2, " jumps"), s.end(3)))
    async with connect(server) as client:
        assert await texts(client) == " fox jumps"


async def test_run_raises_if_the_task_fails(server: StandIn) -> None:
    error = {"code": "WORKER_RESET", "message": "The step failed.", "engine": "llamacpp"}
    server.on("POST /v1/tasks", s.accept())
    server.on("GET stream", s.stream(s.started(), s.end(1, "error", error=error)))
    async with connect(server) as client:
        with pytest.raises(orchd_client.TaskFailed, match="The step failed") as caught:
            await texts(client)
    assert caught.value.code == "WORKER_RESET"


async def test_run_raises_if_the_task_is_cancelled(server: StandIn) -> None:
    server.on("POST /v1/tasks", s.accept())
    server.on("GET stream", s.stream(s.started(), s.end(1, "cancelled")))
    async with connect(server) as client:
        with pytest.raises(orchd_client.TaskCancelled):
            await texts(client)


@pytest.mark.parametrize(("code", "status"), [(200, "ok"), (503, "loading"), (503, "degraded")])
async def test_health_is_an_answer_whatever_it_says(server: StandIn, code: int, status: str) -> None:
    server.on("GET /health", s.answer(s.health_body(status=status), status=code))
    async with connect(server) as client:
        health = await client.health()
    assert health.status == status
    assert health.pools[0].replicas[0].device == "cpu"


async def test_health_without_the_right_token_is_refused(server: StandIn) -> None:
    async with connect(server, token="wrong") as client:
        with pytest.raises(orchd_client.Unauthorized):
            await client.health()


async def test_a_503_that_is_no_health_is_a_refusal(server: StandIn) -> None:
    server.on("GET /health", s.refuse(503, "INTERNAL", "Overloaded."))
    async with connect(server) as client:
        with pytest.raises(orchd_client.NotReady, match="Overloaded"):
            await client.health()


async def test_reload_names_the_model_and_quotes_the_pool(server: StandIn) -> None:
    server.on("POST reload", s.answer({"pool_id": "a/b", "model_id": "new"}))
    async with connect(server) as client:
        assert (await client.reload("a/b", "new.gguf")).model_id == "new"
        await client.reload("a/b")
    assert [seen.body for seen in server.seen] == [{"new_model_ref": "new.gguf"}, None]


async def test_a_reload_is_not_repeated_behind_the_callers_back(server: StandIn) -> None:
    server.on("POST reload", s.drop)
    async with connect(server) as client:
        with pytest.raises(orchd_client.NotReachable):
            await client.reload("default")
    assert len(server.seen) == 1


async def test_a_failed_reload_has_its_type(server: StandIn) -> None:
    server.on("POST reload", s.refuse(422, "RELOAD_FAILED", "Not a GGUF."))
    async with connect(server) as client:
        with pytest.raises(orchd_client.ReloadFailed, match="Not a GGUF"):
            await client.reload("default")


# The token


async def test_the_token_is_in_the_header_and_nowhere_else(server: StandIn, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    server.on("POST /v1/tasks", s.accept())
    server.on("GET stream", s.stream(s.started(), then="cut"), s.refuse(404, "NOT_FOUND", "Gone."))
    async with connect(server) as client:
        with pytest.raises(orchd_client.NotFound) as caught:
            await texts(client)
        assert TOKEN not in repr(client) + repr(caught.value)
    for seen in server.seen:
        assert seen.headers["Authorization"] == f"Bearer {TOKEN}"
        assert TOKEN not in seen.route
    assert TOKEN not in caplog.text


@pytest.mark.parametrize("token", ["", "two words", "line\nbreak", "né"])
def test_a_token_that_no_header_can_carry_is_refused_unseen(token: str) -> None:
    with pytest.raises(ValueError, match="printable ASCII") as caught:
        Client(token=token)
    assert not token or token not in str(caught.value)


@pytest.mark.parametrize("url", ["", "localhost:8737", "ftp://x", "http://", "http://[::1", "http://x:notaport"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"use one such as http://127\.0\.0\.1:8737"):
        Client(url, token=TOKEN)


# What it finds by itself


async def test_url_and_token_come_from_the_accounts_configuration(
    server: StandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ORCHD_PORT", server.url.rpartition(":")[2])
    monkeypatch.setenv("ORCHD_TOKEN", TOKEN)
    server.on("GET /health", s.answer(s.health_body()))
    async with Client() as client:
        assert (await client.health()).status == "ok"


def test_without_a_token_anywhere_it_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.delenv("ORCHD_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="orchd serve"):
        Client()
