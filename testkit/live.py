"""A real ``orchd serve`` in a process of its own, and the plainest client of it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from testkit import openapi_check

TOKEN = "a-token-for-a-real-server-0123456789"
START_S = 60.0


@dataclass(frozen=True)
class Answer:
    """A response, read to its end.

    Attributes:
        headers: With their names in lower case.
    """

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """The body, parsed."""
        return json.loads(self.body)


@dataclass(frozen=True)
class Live:
    """A server that serves.

    Attributes:
        port: On 127.0.0.1, wherever else it listens.
        process: Its process.
        out: What it writes to stdout.
        err: What it logs.
    """

    port: int
    process: subprocess.Popen[bytes]
    out: Path
    err: Path

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        token: str | None = TOKEN,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """Any request; its answer is checked against the OpenAPI documents."""
        given = dict(headers or {})
        if token is not None:
            given["Authorization"] = f"Bearer {token}"
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=START_S)
        with contextlib.closing(connection):
            connection.request(method, path, body, given)
            response = connection.getresponse()
            found = Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        plain = path.partition("?")[0]
        has_origin = "Origin" in given
        openapi_check.check(method, plain, found.status, found.headers, found.body, has_origin=has_origin, sent=body)
        return found

    def post(self, **fields: Any) -> Answer:
        """``POST /v1/tasks``; greedy and with a short prompt unless told otherwise."""
        prompt = {} if "messages" in fields else {"prompt": "the"}
        return self.request("POST", "/v1/tasks", json.dumps({"temperature": 0, **prompt, **fields}).encode())

    def submit(self, **fields: Any) -> str:
        """Submit a task that is accepted."""
        answer = self.post(**fields)
        if answer.status != 202:
            raise RuntimeError(f"a task was refused: {answer.body!r}")
        return str(answer.json()["task_id"])

    def follow(self, task_id: str) -> list[tuple[str, dict[str, Any]]]:
        """Every event of a task: its kind and its data."""
        body = self.request("GET", f"/v1/tasks/{task_id}/stream").body.decode()
        return [(frame["event"], json.loads(frame["data"])) for frame in openapi_check.frames(body)]

    def metrics(self) -> str:
        """What ``/metrics`` shows."""
        return self.request("GET", "/metrics").body.decode()

    def until_full(self, **fields: Any) -> tuple[list[str], Answer]:
        """Submit tasks until one is refused: the ids of those accepted, and the refusal."""
        ids: list[str] = []
        while (answer := self.post(**fields)).status == 202:
            ids.append(answer.json()["task_id"])
            if len(ids) > 1000:
                raise RuntimeError("a thousand tasks were accepted; the queue is not bounded")
        return ids, answer


@contextlib.contextmanager
def serving(
    folder: Path,
    toml: str,
    *args: str,
    environ: Mapping[str, str | None] | None = None,
    command: Sequence[str] = (sys.executable, "-m", "orchd"),
) -> Iterator[Live]:
    """Run ``orchd serve`` with a configuration until the context ends.

    Args:
        folder: For the configuration, the logs and the home of the process.
        toml: The configuration.
        args: Further arguments.
        environ: Variables besides ``ORCHD_TOKEN``, ``HOME`` and ``PATH``; None takes one out.
        command: What runs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config, out, err = folder / "orchd.toml", folder / "out", folder / "err"
    config.write_text(toml, encoding="utf-8")
    inherited = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH") if name in os.environ}
    given = {**inherited, "HOME": str(folder), "ORCHD_TOKEN": TOKEN, **(environ or {})}
    env = {name: value for name, value in given.items() if value is not None}
    with out.open("wb") as out_stream, err.open("wb") as err_stream:
        process = subprocess.Popen(
            [*command, "serve", "--config", str(config), "--port", "0", *args],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=out_stream,
            stderr=err_stream,
        )
    try:
        yield Live(_port(process, out, err), process, out, err)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _port(process: subprocess.Popen[bytes], out: Path, err: Path) -> int:
    deadline = time.monotonic() + START_S
    while not (found := re.search(r"is ready at http://\S+:(\d+)\s", out.read_text())):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"orchd serve is not ready: {err.read_text()}")
        time.sleep(0.02)
    return int(found[1])
