"""Every example ends in a sentence when the server is down, full, or does not accept the token."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from testkit import stand_in
from testkit.account import EXAMPLES, ROOT, ServerProcess, serving
from testkit.process import free_port

PROGRAMS: dict[str, list[str]] = {
    "python_client.py": [sys.executable, "python_client.py"],
    "python_httpx.py": [sys.executable, "python_httpx.py"],
    "node_fetch.mjs": ["node", "node_fetch.mjs"],
    "curl.sh": ["bash", "curl.sh"],
    "batch.py": [sys.executable, "batch.py", "--count", "2", "--max-tokens", "4"],
}
TRACES = ("Traceback", "Error:", "    at ", "node:internal", "unhandled")
ACCEPTED = {
    "task_id": "0e4b9d4a-6c7e-4f0e-9d35-3c1b7cf0a111",
    "queue_position": 0,
    "predicted_start_ms": 0,
    "backoff_ms": 0,
}


@pytest.fixture(params=PROGRAMS)
def program(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """A command that runs an example."""
    interpreter, script, *options = PROGRAMS[request.param]
    if interpreter == "node" and shutil.which("node") is None:
        pytest.skip("there is no Node.js here")
    out = [str(tmp_path / "answers.jsonl")] if script == "batch.py" else []
    return [interpreter, str(EXAMPLES / script), *options, *out]


def fail(command: list[str], home: Path, url: str, **more: str) -> str:
    """What an example says that fails, in an account that has nothing but these settings."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("ORCHD_", "XDG_"))}
    env |= {"HOME": str(home), "PYTHONPATH": str(ROOT), "ORCHD_URL": url, "ORCHD_PORT": url.rpartition(":")[2]}
    done = subprocess.run(
        command, env={**env, **more}, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode not in (0, 130), done.stdout
    for trace in TRACES:
        assert trace not in done.stderr, done.stderr
    return done.stdout + done.stderr


def test_no_server(program: list[str], tmp_path: Path) -> None:
    said = fail(program, tmp_path, f"http://127.0.0.1:{free_port()}", ORCHD_TOKEN=stand_in.TOKEN)
    assert "orchd serve` running" in said


def test_no_token(program: list[str], tmp_path: Path) -> None:
    said = fail(program, tmp_path, "http://127.0.0.1:9")
    assert f"{tmp_path}/.local/state/orchd/token" in said
    assert "orchd serve" in said


def test_a_wrong_token(program: list[str], tmp_path: Path, server: ServerProcess) -> None:
    said = fail(program, tmp_path, server.url, ORCHD_TOKEN="not-the-token-0123456789")
    assert "token" in said


def test_a_server_that_is_killed_meanwhile(program: list[str], tmp_path: Path) -> None:
    with stand_in.serving() as server:
        server.on("POST /v1/tasks", stand_in.answer(ACCEPTED, status=202))
        server.on(
            "GET stream", stand_in.stream(stand_in.started(), stand_in.token(1, "The"), then="cut"), stand_in.drop
        )
        fail(program, tmp_path, server.url, ORCHD_TOKEN=stand_in.TOKEN)


@pytest.mark.parametrize("program", sorted({*PROGRAMS} - {"curl.sh"}), indirect=True)  # that one prints the stream
def test_a_task_that_fails(program: list[str], tmp_path: Path) -> None:
    error = {"code": "WORKER_RESET", "message": "the step failed", "engine": "llamacpp"}
    with stand_in.serving() as server:
        server.on("POST /v1/tasks", stand_in.answer(ACCEPTED, status=202))
        server.on("GET stream", stand_in.stream(stand_in.started(), stand_in.end(1, "error", error=error)))
        assert "the step failed" in fail(program, tmp_path, server.url, ORCHD_TOKEN=stand_in.TOKEN)


def test_something_else_that_answers(program: list[str], tmp_path: Path) -> None:
    with stand_in.serving() as server:
        server.on("POST /v1/tasks", stand_in.raw(b"<h1>a page</h1>", status=502))
        said = fail(program, tmp_path, server.url, ORCHD_TOKEN=stand_in.TOKEN)
        assert "like orchd" in said or "502" in said


@pytest.fixture(scope="module")
def small(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with one slot and one place in its queue."""
    home, config = tmp_path_factory.mktemp("small"), "[queue]\ncapacity = 1\n[tasks]\ncancel_grace_s = 0.2\n"
    with serving(home, tiny_model_path, config, "slots = 1\nctx = 65536") as server:
        yield server


@contextlib.contextmanager
def full(server: ServerProcess) -> Iterator[None]:
    """Its slot and its place are taken."""
    _until(lambda: server.busy() == 0)
    streams = []
    for _ in range(2):
        task = server.post("/v1/tasks", prompt="the river", max_tokens=60_000, ignore_eos=True)["task_id"]
        request = urllib.request.Request(f"{server.url}/v1/tasks/{task}/stream")
        request.add_header("Authorization", f"Bearer {server.token}")
        streams.append(urllib.request.urlopen(request, timeout=20))
        _until(lambda: server.busy() == 1)
    try:
        yield
    finally:
        for stream in reversed(streams):  # else the one that waits gets the slot
            stream.close()


@pytest.mark.parametrize("program", ["python_httpx.py", "curl.sh"], indirect=True)
def test_a_full_queue_ends_those_that_do_not_wait(program: list[str], small: ServerProcess, tmp_path: Path) -> None:
    with full(small):
        said = fail(program, tmp_path, small.url, ORCHD_TOKEN=small.token)
    assert "the queue is full" in said


@pytest.mark.parametrize("program", ["python_client.py", "node_fetch.mjs"], indirect=True)
def test_a_full_queue_is_told_by_those_that_wait(program: list[str], small: ServerProcess) -> None:
    with full(small), subprocess.Popen(program, env=small.env, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        assert "the queue is full" in running.stderr.readline()
        running.kill()


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
