"""The real composition on a loopback port, with a brake in llama.cpp's step so that no test depends on speed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from multidict import CIMultiDictProxy
from prometheus_client.parser import text_string_to_metric_families

from engines.api import (
    DeviceSpec,
    ModelSpec,
    SamplingParams,
    Sequence,
)
from engines.llamacpp.engine import LlamaCppEngine
from orchd.machine.devices import Device
from orchd.observer import Observer, Summary
from orchd.server import Server
from orchd.settings.config import Config
from orchd.settings.credentials import Credentials
from testkit import openapi_check
from testkit.brake import DEADLINE_S, Brake, BrakedEngine
from testkit.observers import WhenReady

TOKEN = "a-token-for-tests-0123456789"
POOL = {"devices": ["cpu"], "slots": 2, "ctx": 512, "batch": 64}


@dataclass(frozen=True)
class Answer:
    """A response, read to its end."""

    status: int
    headers: CIMultiDictProxy[str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Event:
    """One event of a stream."""

    id: int
    kind: str
    data: dict[str, Any]


@dataclass
class Running:
    """A server that serves, and a client of it."""

    url: str
    brake: Brake
    session: aiohttp.ClientSession
    summary: asyncio.Future[Summary] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    async def request(
        self,
        method: str,
        path: str,
        *,
        token: str | None = TOKEN,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        **fields: Any,
    ) -> Answer:
        """Send a body, or the fields of a JSON object."""
        given = {"Authorization": f"Bearer {token}"} if token is not None else {}
        data = json.dumps(fields).encode() if fields else body
        async with self.session.request(method, self.url + path, headers={**given, **(headers or {})}, data=data) as r:
            return Answer(r.status, r.headers, await r.read())

    async def post(self, body: bytes | None = None, **fields: Any) -> Answer:
        """``POST /v1/tasks``."""
        return await self.request("POST", "/v1/tasks", body=body, **fields)

    async def submit(self, **fields: Any) -> str:
        """Submit a task that is accepted; greedy and with a short prompt unless told otherwise."""
        answer = await self.post(
            **{"temperature": 0, **({} if fields.get("messages") else {"prompt": "the"}), **fields}
        )
        assert answer.status == 202, answer.body
        return str(answer.json()["task_id"])

    @contextlib.asynccontextmanager
    async def listen(self, task_id: str, *, last: int | None = None, path: str = "") -> AsyncIterator[Listener]:
        """Open a stream; leaving the context hangs up."""
        headers = {"Authorization": f"Bearer {TOKEN}"} | ({} if last is None else {"Last-Event-ID": str(last)})
        async with self.session.get(f"{self.url}/v1/tasks/{task_id}/stream{path}", headers=headers) as response:
            yield Listener(response)
            response.close()

    async def events(self, task_id: str, *, last: int | None = None, path: str = "") -> list[Event]:
        """Everything that a stream sends until it ends."""
        async with self.listen(task_id, last=last, path=path) as listener:
            return [event async for event in listener]

    async def run(self, **fields: Any) -> list[Event]:
        """Submit and follow to the end."""
        return await self.events(await self.submit(**fields))

    async def metrics(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        """Every sample, by name and labels."""
        text = (await self.request("GET", "/metrics")).body.decode()
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    async def total(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        samples = await self.metrics()
        return sum(v for (sample, has), v in samples.items() if sample == name and labels.items() <= dict(has).items())

    async def started(self, count: int) -> None:
        """Return when so many tasks have been taken by a worker."""

        async def reached() -> bool:
            return await self.total("tasks_enqueued_total") >= count

        await until(reached, f"{count} tasks have started")

    async def busy(self) -> int:
        """Slots in use, of all replicas."""
        pools = (await self.request("GET", "/health")).json()["pools"]
        return sum(replica["busy"] for pool in pools for replica in pool["replicas"])


class Listener:
    """One listener of a stream: events as they come."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response
        self.raw = b""

    def __aiter__(self) -> Listener:
        return self

    async def __anext__(self) -> Event:
        while True:
            block = await self.block()
            if block is None:
                raise StopAsyncIteration
            if not block.startswith(":"):
                return _event(block)

    async def block(self) -> str | None:
        """The next event or comment as it was sent, None at the end."""
        lines: list[str] = []
        while line := await asyncio.wait_for(self.response.content.readline(), DEADLINE_S):
            self.raw += line
            if line == b"\n":
                return "".join(lines)
            lines.append(line.decode())
        assert not lines, "the stream ends inside an event"
        return None


def _event(block: str) -> Event:
    fields = dict(line.split(": ", 1) for line in block.splitlines())
    return Event(int(fields["id"]), fields["event"], json.loads(fields["data"]))


def text_of(events: list[Event]) -> str:
    """The answer."""
    return "".join(event.data.get("t", "") for event in events if event.kind == "token")


def reasoning_of(events: list[Event]) -> str:
    """What the model thought."""
    return "".join(event.data.get("r", "") for event in events if event.kind == "token")


async def until(condition: Callable[[], Any], what: str) -> None:
    """Poll until a condition holds; it may be a coroutine function."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        found = condition()
        if await found if asyncio.iscoroutine(found) else found:
            return
        assert time.monotonic() < deadline, f"{what}: not within {DEADLINE_S} s"
        await asyncio.sleep(0.005)


def on_cpu(pool: int, replica: int) -> Device:
    return Device(f"cpu#{pool}.{replica}", DeviceSpec("cpu", threads=1))


@contextlib.asynccontextmanager
async def serving(
    model: Path,
    *more: Path,
    brake: Brake | None = None,
    ready: bool = True,
    device_of: Callable[[int, int], Device] = on_cpu,
    send_buffer_bytes: int | None = None,
    observer: Callable[[Callable[[Summary], object]], Observer] = WhenReady,
    **tables: Any,
) -> AsyncIterator[Running]:
    """Serve models until the context ends.

    Args:
        model: Of the pool ``default``.
        more: Of further pools, ``pool1`` and so on.
        brake: One that is set already, to hold up the load.
        ready: Whether to wait until every model is loaded.
        device_of: The device of a pool's replica, both by their numbers.
        send_buffer_bytes: How much the kernel takes for a client that does not read.
        observer: Makes one, which must tell what it is given that the server is ready.
        tables: As in a configuration file; ``pool`` is laid over every pool.
    """
    brake = brake or Brake()
    paths = [model, *more]
    pools = [
        {**POOL, "id": f"pool{index}" if index else "default", "model": str(path)} | tables.get("pool", {})
        for index, path in enumerate(paths)
    ]
    config = msgspec.convert({**{k: v for k, v in tables.items() if k != "pool"}, "pools": pools}, Config)
    placed = [
        [device_of(number, replica) for replica in range(len(pool.devices))] for number, pool in enumerate(config.pools)
    ]
    listening = socket.create_server((config.server.host, 0))
    if send_buffer_bytes is not None:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=DEADLINE_S),
        trace_configs=[openapi_check.trace()],
    ) as session:
        host, port = listening.getsockname()
        running = Running(f"http://{host}:{port}", brake, session)
        told = observer(running.summary.set_result)
        server = Server(config, Credentials(TOKEN, "tests"), BrakedEngine(brake), placed, told)
        serve = asyncio.create_task(server.run(paths, listening))
        try:
            done = {serve, running.summary} if ready else {serve, asyncio.create_task(_reachable(running))}
            await asyncio.wait(done, return_when=asyncio.FIRST_COMPLETED)  # type: ignore[type-var]  # tasks of different results
            if serve.done():
                serve.result()
            yield running
        finally:
            brake.release()
            await session.close()
            serve.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await serve
            listening.close()


async def _reachable(running: Running) -> None:
    async def answers() -> bool:
        with contextlib.suppress(aiohttp.ClientError):
            return bool((await running.request("GET", "/health")).status)
        return False

    await until(answers, "the server answers")


def engine_text(model: Path, prompt: str, *, max_tokens: int, sampling: SamplingParams | None = None) -> str:
    """What llama.cpp writes without orchd, on a pool's slots, alone."""
    engine = LlamaCppEngine()
    vocab = engine.load_vocab(model)
    spec = ModelSpec(model, slots=POOL["slots"], ctx=POOL["ctx"], batch=POOL["batch"])  # type: ignore[arg-type]  # numbers
    loaded = engine.load(spec, DeviceSpec("cpu", threads=1))
    try:
        params = sampling or SamplingParams(temperature=0)
        loaded.admit(Sequence("alone", vocab.tokenize(prompt), max_tokens, sampling=params))
        text = ""
        while loaded.busy:
            text += "".join(event.text for event in loaded.step())
        return text
    finally:
        loaded.close()
        vocab.close()


def new_id() -> str:
    return str(uuid.uuid4())
