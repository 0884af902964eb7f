"""`orchd serve` as a process of its own, in an account where orchd never ran."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOKEN = "a-token-for-processes-0123456789"
DEADLINE_S = 30.0


@dataclass
class Process:
    """A server that was started; its output goes to files in its home."""

    popen: subprocess.Popen[bytes]
    home: Path
    environ: dict[str, str]

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def stdout(self) -> str:
        return (self.home / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self.home / "stderr").read_text()

    def wait_ready(self) -> int:
        """Return the port once the ready screen is out."""
        self.until(lambda: "/stream" in self.stdout and self.stdout.endswith("\n\n"), "the ready screen")
        found = re.search(r"ready at http://\S+:(\d+)\s", self.stdout)
        assert found, self.stdout
        return int(found[1])

    def wait_healthy(self, port: int) -> None:
        """Return once it answers on this port that it is ready, whatever became of its output."""

        def healthy() -> bool:
            with contextlib.suppress(OSError):
                return call(port, "GET", "/health")[0] == 200
            return False

        self.until(healthy, "an answer to GET /health")

    def until(self, condition: Callable[[], Any], what: str) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert self.popen.poll() is None, f"orchd ended with {self.popen.returncode}: {self.stderr}"
            assert time.monotonic() < deadline, f"{what}: not within {DEADLINE_S} s\n{self.stdout}\n{self.stderr}"
            time.sleep(0.01)

    def wait(self, limit_s: float = DEADLINE_S) -> int:
        """The exit code."""
        return self.popen.wait(limit_s)

    def send(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    def stop(self) -> None:
        """As a person would; at last as the kernel does."""
        self.send(signal.SIGTERM)
        try:
            self.wait()
        except subprocess.TimeoutExpired:
            self.popen.kill()


@contextmanager
def orchd_serve(
    *args: str,
    home: Path,
    token: str | None = TOKEN,
    stdout: int | None = None,
    stderr: int | None = None,
    redirect: str = "",
    module: str = "orchd",
    command: str = "serve",
    **environ: str,
) -> Iterator[Process]:
    """Run `orchd serve`, or another command, with arguments until the context ends.

    Args:
        args: For the command.
        home: The account's; where it runs, and where its output goes.
        token: ``ORCHD_TOKEN``.
        stdout: Another descriptor for its output than that of a file.
        stderr: The same for its log.
        redirect: What a shell does with its descriptors, such as ``2>&-``.
        module: What stands in for the program.
        command: Of the program.
        environ: Added to a clean environment.
    """
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("ORCHD_", "XDG_"))}
    root = str(Path(__file__).parents[1])
    env = clean | {"HOME": str(home), "PYTHONPATH": root} | environ
    if token is not None:
        env["ORCHD_TOKEN"] = token
    with (home / "stdout").open("wb") as out, (home / "stderr").open("wb") as err:
        popen = subprocess.Popen(
            ["sh", "-c", f'exec "$@" {redirect}', "sh", sys.executable, "-m", module, command, *args],
            cwd=home,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=out if stdout is None else stdout,
            stderr=err if stderr is None else stderr,
        )
    try:
        yield Process(popen, home, env)
    finally:
        if popen.poll() is None:
            popen.kill()
        popen.wait()


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def pipe_without_reader() -> int:
    """The end to write into."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def call(
    port: int, method: str, path: str, body: object = None, *, token: str = TOKEN
) -> tuple[int, http.client.HTTPResponse]:
    """Send a request; the response is still to be read."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)
    data = None if body is None else json.dumps(body)
    connection.request(method, path, data, {"Authorization": f"Bearer {token}"})
    response = connection.getresponse()
    return response.status, response


def submit(port: int, **fields: object) -> str:
    """Submit a task that is accepted."""
    status, response = call(port, "POST", "/v1/tasks", fields)
    body = json.loads(response.read())
    assert status == 202, body
    return str(body["task_id"])


def follow(port: int, task_id: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """A task's events as they come: kind and data."""
    status, response = call(port, "GET", f"/v1/tasks/{task_id}/stream")
    assert status == 200
    kind = ""
    for line in response:
        name, _, value = line.decode().rstrip("\n").partition(": ")
        if name == "event":
            kind = value
        elif name == "data":
            yield kind, json.loads(value)
