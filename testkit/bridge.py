"""`orchd openai` on a loopback port of this process, and a client for it."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
from multidict import CIMultiDictProxy

from orchd.client import Client
from orchd.http.connection import serving
from orchd.openai.app import create_app
from orchd.openai.errors import envelope
from orchd.settings.config import ServerConfig


@dataclass(frozen=True)
class Answer:
    """A response, read to its end."""

    status: int
    headers: CIMultiDictProxy[str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """What an error body says; it says nothing else."""
        [(name, error)] = self.json().items()
        assert name == "error"
        assert set(error) == {"message", "type", "param", "code"}
        assert isinstance(error, dict)
        return error

    def chunks(self) -> list[dict[str, Any]]:
        """What was streamed, without the end's mark, which must be there unless the last chunk is an error."""
        data = [line.removeprefix("data: ") for line in self.body.decode().split("\n") if line.startswith("data: ")]
        if data[-1] != "[DONE]":
            assert "error" in data[-1]
            data.append("")
        return [json.loads(chunk) for chunk in data[:-1]]


@dataclass(frozen=True)
class Bridge:
    """A bridge that serves."""

    url: str
    token: str
    session: aiohttp.ClientSession

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    async def request(
        self,
        method: str,
        path: str,
        *,
        token: str | None = "",
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        **fields: Any,
    ) -> Answer:
        """Send a body, or the fields of a JSON object; the right token unless there is another."""
        given = {} if token is None else {"Authorization": f"Bearer {token or self.token}"}
        data = json.dumps(fields).encode() if fields else body
        async with self.session.request(method, self.url + path, headers={**given, **(headers or {})}, data=data) as r:
            return Answer(r.status, r.headers, await r.read())

    async def chat(self, **fields: Any) -> Answer:
        """``POST /v1/chat/completions``, with a model and a message unless there are others."""
        basic = {"model": "default", "messages": [{"role": "user", "content": "hi"}]}
        return await self.request("POST", "/v1/chat/completions", **{**basic, **fields})

    async def complete(self, **fields: Any) -> Answer:
        """``POST /v1/completions``, likewise."""
        return await self.request("POST", "/v1/completions", **{"model": "default", "prompt": "the", **fields})


@contextlib.asynccontextmanager
async def bridging(server_url: str, token: str, **settings: Any) -> AsyncIterator[Bridge]:
    """Serve until the context ends.

    Args:
        server_url: Of the server.
        token: Of both.
        settings: Of ``[server]``.
    """
    timeout = aiohttp.ClientTimeout(total=30)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        async with Client(server_url, token=token) as client, aiohttp.ClientSession(timeout=timeout) as session:
            app = create_app(client, ServerConfig(**settings), token=token, address="127.0.0.1")
            async with serving(app, listening, envelope=envelope):
                yield Bridge(f"http://127.0.0.1:{listening.getsockname()[1]}", token, session)
