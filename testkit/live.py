"""A real ``orchd serve``, and a client for it that checks every answer against the OpenAPI documents."""

from __future__ import annotations

import contextlib
import http.client
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from testkit import openapi_check
from testkit.process import DEADLINE_S, TOKEN, Process, orchd_serve


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
    """

    port: int
    process: Process

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
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE_S)
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
def serving(folder: Path, toml: str, *args: str, token: str | None = TOKEN, module: str = "orchd") -> Iterator[Live]:
    """Run ``orchd serve`` with a configuration until the context ends.

    Args:
        folder: For the configuration, the logs and the home of the process.
        toml: The configuration.
        args: Further arguments.
        token: ``ORCHD_TOKEN``.
        module: What stands in for the program.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "orchd.toml"
    config.write_text(toml, encoding="utf-8")
    with orchd_serve("--config", str(config), "--port", "0", *args, home=folder, token=token, module=module) as process:
        yield Live(process.wait_ready(), process)
        process.stop()
