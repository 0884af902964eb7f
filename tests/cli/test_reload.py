"""`orchd reload`: what it prints, and its exit code."""

from __future__ import annotations

import json

import pytest

from testkit import stand_in as s
from testkit.stand_in import StandIn
from tests.cli.shell import on_terminal, one_line, orchd


def test_reload_tells_the_old_and_the_new_model(server: StandIn) -> None:
    server.on("GET /health", s.answer(s.health_body(model_id="old")))
    server.on("POST reload", s.answer({"pool_id": "default", "model_id": "new"}))
    result = orchd("reload", "default", "new.gguf", "--url", server.url)
    assert result.exit_code == 0
    assert result.stdout.startswith("default: old → new in ")
    assert server.requests("POST reload")[0].body == {"new_model_ref": "new.gguf"}


def test_reload_as_json(server: StandIn) -> None:
    server.on("GET /health", s.answer(s.health_body(model_id="old")))
    server.on("POST reload", s.answer({"pool_id": "default", "model_id": "new"}))
    answer = json.loads(orchd("reload", "default", "--json", "--url", server.url).stdout)
    assert answer.pop("seconds") >= 0
    assert answer == {"pool_id": "default", "old_model_id": "old", "model_id": "new"}


@pytest.mark.parametrize(("status", "code"), [(422, "RELOAD_FAILED"), (409, "RELOAD_IN_PROGRESS"), (404, "NOT_FOUND")])
def test_a_reload_that_is_refused_is_1(server: StandIn, status: int, code: str) -> None:
    server.on("GET /health", s.answer(s.health_body()))
    server.on("POST reload", s.refuse(status, code, "Not a GGUF; the old model still serves."))
    result = orchd("reload", "default", "bad.gguf", "--url", server.url)
    assert result.exit_code == 1
    assert "old model still serves" in one_line(result.stderr)
    assert result.stdout == ""


def test_a_terminal_sees_that_a_reload_is_under_way(server: StandIn) -> None:
    server.on("GET /health", s.answer(s.health_body(model_id="old")))
    server.on("POST reload", s.answer({"pool_id": "default", "model_id": "new"}))
    sent, _ = on_terminal("reload", "default", "--url", server.url)
    assert "reloading default" in sent
    assert "default: old → new in " in sent
