"""`orchd openai` as a process, beside a real server."""

from __future__ import annotations

import http.client
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from testkit.account import ROOT, ServerProcess, serving
from testkit.process import TOKEN, Process, call, free_port, orchd_serve

NO_ENGINE = """
import sys
import orchd.openai.command
ours = {name for name in sys.modules if name.split(".")[0] in ("engines", "orchd")}
assert "llama_cpp" not in sys.modules and "numpy" not in sys.modules
assert {name for name in ours if name.startswith("engines")} == {"engines", "engines.api"}
assert not {"orchd.server", "orchd.service", "orchd.metrics"} & ours
"""


@pytest.fixture(scope="module")
def server(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    pool = "slots = 2\nctx = 4096\nbatch = 64"
    with serving(tmp_path_factory.mktemp("home"), tiny_model_path, "[queue]\ncapacity = 1\n", pool) as process:
        yield process


@contextmanager
def bridge(server: ServerProcess, home: Path, *args: str) -> Iterator[tuple[Process, int]]:
    command = ["--port", "0", "--url", server.url, *args]
    with orchd_serve(*command, home=home, token=server.token, command="openai") as process:
        process.until(
            lambda: process.stdout.endswith("\n\n") and "OPENAI_API_KEY" in process.stdout, "the ready screen"
        )
        found = re.search(r"at http://127\.0\.0\.1:(\d+)/v1\n", process.stdout)
        assert found, process.stdout
        yield process, int(found[1])


def test_no_engine_is_imported() -> None:
    done = subprocess.run([sys.executable, "-c", NO_ENGINE], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def stream(port: int, token: str, **fields: object) -> http.client.HTTPResponse:
    body = {"model": "default", "prompt": "the", "stream": True, **fields}
    status, response = call(port, "POST", "/v1/completions", body, token=token)
    assert status == 200
    return response


def test_it_answers_and_its_screen_does_not_show_the_token(server: ServerProcess, tmp_path: Path) -> None:
    with bridge(server, tmp_path) as (process, port):
        lines = stream(port, server.token, max_tokens=8, stream_options={"include_usage": True}).read().split(b"\n")
        assert lines[-3] == b"data: [DONE]"
        usage = json.loads(lines[-5].removeprefix(b"data: "))["usage"]
        assert usage["completion_tokens"] == 8
        assert usage["prompt_tokens"] > 0
        assert server.token not in process.stdout + process.stderr


def test_who_leaves_frees_the_slot(server: ServerProcess, tmp_path: Path) -> None:
    with bridge(server, tmp_path) as (process, port):
        response = stream(port, server.token, max_tokens=4000, temperature=0)
        response.readline()
        process.until(lambda: server.busy() == 1, "the task runs")
        response.close()
        process.until(lambda: server.busy() == 0, "the slot is free")


def test_a_stream_may_end_after_a_signal(server: ServerProcess, tmp_path: Path) -> None:
    with bridge(server, tmp_path) as (process, port):
        response = stream(port, server.token, max_tokens=64)
        response.readline()
        process.send(signal.SIGTERM)
        assert response.read().endswith(b"data: [DONE]\n\n")
        assert process.wait() == 0


def test_a_second_signal_ends_it_at_once(server: ServerProcess, tmp_path: Path) -> None:
    with bridge(server, tmp_path) as (process, port):
        response = stream(port, server.token, max_tokens=4000, temperature=0)
        response.readline()
        process.send(signal.SIGTERM)
        began = time.monotonic()
        while process.popen.poll() is None and time.monotonic() < began + 10:
            process.send(signal.SIGTERM)
            time.sleep(0.01)
        assert process.wait() == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("args", "token", "sentence"),
    [
        (["--port", "0"], None, "no token"),
        (["--url", "nowhere", "--port", "0"], TOKEN, "'nowhere' is not the address of a server"),
        (["--host", "203.0.113.1", "--port", "0"], TOKEN, "cannot listen on 203.0.113.1"),
        (["--token-file", "/nonexistent", "--port", "0"], None, "/nonexistent"),
    ],
)
def test_what_is_set_wrongly_is_one_line(tmp_path: Path, args: list[str], token: str | None, sentence: str) -> None:
    with orchd_serve(*args, home=tmp_path, token=token, command="openai") as process:
        assert process.wait() == 2
        assert process.stderr.startswith("orchd: ")
        assert process.stderr.count("\n") == 1
        assert sentence in process.stderr


def test_it_may_start_before_the_server(tiny_model_path: Path, tmp_path: Path) -> None:
    port = free_port()
    with orchd_serve("--port", "0", "--url", f"http://127.0.0.1:{port}", home=tmp_path, command="openai") as process:
        process.until(lambda: "OPENAI_API_KEY" in process.stdout, "the ready screen")
        found = re.search(r"at http://127\.0\.0\.1:(\d+)/v1\n", process.stdout)
        assert found
        mine = int(found[1])
        assert call(mine, "GET", "/v1/models")[0] == 503
        home = tmp_path / "server"
        home.mkdir()
        with orchd_serve("-m", str(tiny_model_path), "--port", str(port), home=home) as server:
            server.wait_ready()
            assert call(mine, "GET", "/v1/models")[0] == 200
            server.stop()
