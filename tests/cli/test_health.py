"""`orchd health`: what it prints, its exit code, and what it does not import."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from typing import Any

import pytest

from orchd.cli.health import without_typer
from testkit import stand_in as s
from testkit.stand_in import TOKEN, StandIn
from tests.cli.shell import on_terminal, one_line, orchd


def test_health_of_a_server_that_is_ready(server: StandIn) -> None:
    server.on("GET /health", s.answer(s.health_body()))
    result = orchd("health", "--url", server.url)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0] == "ok"
    assert result.stdout.splitlines()[2].split() == ["default", "tiny-llama", "0", "cpu", "ready", "1/4"]
    assert "\x1b" not in result.stdout


@pytest.mark.parametrize("status", ["loading", "degraded"])
def test_health_of_a_server_that_is_not_ready_is_1(server: StandIn, status: str) -> None:
    server.on("GET /health", s.answer(s.health_body(status=status), status=503))
    result = orchd("health", "--url", server.url, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout) == s.health_body(status=status) | {"ready": False}
    assert result.stderr == ""


@pytest.mark.parametrize(("flags", "code"), [([], 0), (["--strict"], 1)])
def test_health_of_a_server_that_is_ready_and_degraded(server: StandIn, flags: list[str], code: int) -> None:
    """It has lost one of two GPUs, and `until orchd health` must end all the same."""
    body: Any = s.health_body(status="degraded")
    lost = {"id": "1", "device": "gpu:1", "alive": False, "slots": 4, "busy": 0}
    body["pools"][0] |= {"ready": True, "replicas": [*body["pools"][0]["replicas"], lost]}
    server.on("GET /health", s.answer(body))
    result = orchd("health", "--url", server.url, "--json", *flags)
    assert (result.exit_code, json.loads(result.stdout)) == (code, body | {"ready": True})
    assert one_line(result.stderr) == "orchd: ready, but degraded: not alive: default/1 on gpu:1\n"


def test_a_server_that_is_ok_but_says_503_is_not_ready(server: StandIn) -> None:
    """As while it drains: what it answers with counts."""
    server.on("GET /health", s.answer(s.health_body(), status=503))
    assert orchd("health", "--url", server.url).exit_code == 1
    assert orchd("health", "--url", server.url, "--strict").exit_code == 1


def test_no_color_is_heard(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    server.on("GET /health", s.answer(s.health_body()))
    assert "\x1b[1;32mok" in on_terminal("health", "--url", server.url)[0]
    monkeypatch.setenv("NO_COLOR", "1")
    assert "32m" not in on_terminal("health", "--url", server.url)[0]


def test_a_pipe_gets_no_colour_even_if_the_environment_forces_it(
    server: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.on("GET /health", s.answer(s.health_body()))
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b" not in orchd("health", "--url", server.url).stdout


def test_health_imports_nothing_that_takes_long(server: StandIn) -> None:
    """Scripts and systemd call it every few seconds."""
    server.on("GET /health", s.answer(s.health_body()))
    program = (
        "import sys, orchd.cli\n"
        "try: orchd.cli.main()\n"
        "finally: print(*sorted({'aiohttp', 'rich', 'typer', 'orchd.schemas', 'asyncio'} & set(sys.modules)))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, "health", "--url", server.url],
        env={**os.environ, "ORCHD_TOKEN": TOKEN},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.splitlines()[0] == "ok"
    assert ran.stdout.splitlines()[-1] == ""


@pytest.mark.parametrize("args", [["--help"], ["--nonsense"], ["--url"], ["more"], ["--js"]])
def test_whatever_health_cannot_make_sense_of_is_typers(args: list[str]) -> None:
    assert without_typer(args) is None


@pytest.mark.parametrize(
    "answer",
    [
        s.answer([1]),
        s.answer({}),
        s.answer({"status": "ok", "pools": 1}),
        s.answer({"status": "odd", "pools": []}),
        s.answer({"status": "ok", "pools": [{"id": "x"}]}),
        s.raw(b"<html>"),
        s.raw(b"<html>", status=502),
        s.raw(b"", status=204),
    ],
)
def test_an_answer_that_is_not_orchds_is_one_line_and_2(server: StandIn, answer: s.Step) -> None:
    server.on("GET /health", answer)
    result = orchd("health", "--url", server.url)
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"the server at {server.url} does not answer like orchd" in one_line(result.stderr)


def test_what_is_no_http_is_one_line_and_2() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:

        def greet() -> None:
            connection, _ = other.accept()
            connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
            connection.close()

        greeting = threading.Thread(target=greet)
        greeting.start()
        result = orchd("health", "--url", f"http://127.0.0.1:{other.getsockname()[1]}")
        greeting.join()
    assert (result.exit_code, result.stdout) == (2, "")
    assert "does not answer like orchd" in one_line(result.stderr)


def test_a_models_name_cannot_drive_the_terminal(server: StandIn) -> None:
    server.on("GET /health", s.answer(s.health_body(model_id="\x1b[2Jx")))
    assert "\x1b" not in orchd("health", "--url", server.url).stdout
