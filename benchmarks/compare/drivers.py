"""How each server is configured, started and spoken to. What is not set here is the server's own default.

The same for all: the model file, slots, context tokens per slot, threads, batch sizes, sampling, output length.
"""

from __future__ import annotations

import json
import re
import secrets
import sys
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final, NamedTuple, Protocol

import aiohttp

UBATCH: Final = 512
"""Most tokens of one forward pass, everywhere the default."""
SAMPLING: Final[Mapping[str, float]] = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05}
"""What all of them would do unasked."""
GREEDY: Final[Mapping[str, float]] = {"temperature": 0.0}


@dataclass(frozen=True)
class Setup:
    """What a server is to hold.

    Attributes:
        model: The GGUF file.
        slots: Requests at the same time.
        ctx: Tokens per slot.
        threads: Compute threads, for prompts and for decoding.
        prompt_store: Whether prompts that have left their slot may be kept in further memory (the default of both).
        peer_batch: llama-server's ``--batch-size``: the most tokens it takes up between two looks at its streams. orchd
            has no such thing; it fits prompt chunks to `workers.step_target_ms`.
        flash_attn: ``auto``, ``on`` or ``off``, as orchd and llama-server both call it.
    """

    model: Path
    slots: int
    ctx: int
    threads: int
    prompt_store: bool = True
    peer_batch: int = 2048
    flash_attn: str = "auto"


@dataclass(frozen=True)
class Task:
    """One request; the output is always `max_tokens` long, except from llama-cpp-python's server.

    ``batch`` says that nobody waits for it, to a server that knows priorities.
    """

    prompt: str
    max_tokens: int
    seed: int
    sampling: Mapping[str, float] = field(default_factory=lambda: SAMPLING)
    json_schema: Mapping[str, Any] | None = None
    batch: bool = False


class Piece(NamedTuple):
    """What an event says: whether it carries text, and the number of output tokens where it states one."""

    text: bool
    tokens_out: int | None = None


class Driver(Protocol):
    """One kind of server.

    Attributes:
        name: In tables.
        counts: Whether it states how many tokens it wrote, and writes as many as asked.
        health: The path that answers 200 once it is ready.
        headers: On every request.
        keeps_connections: Whether a connection can be used again after a stream.
    """

    name: str
    counts: bool
    health: str
    headers: Mapping[str, str]
    keeps_connections: bool

    def command(self, setup: Setup, folder: Path, port: int) -> list[str]:
        """What to run, with what it needs written into `folder`."""

    def environment(self) -> dict[str, str]:
        """Variables besides the benchmark's own."""

    def url(self, log: str, port: int) -> str | None:
        """Where it listens, once its log says so or at once if it was told."""

    def stream(self, session: aiohttp.ClientSession, task: Task) -> Any:
        """An async context manager: the open response that streams the output."""

    def read(self, event: bytes) -> Piece:
        """Decode one event. Raises `RuntimeError` for an error."""


class Orchd:
    """A server of ours.

    Args:
        name: In the tables.
        setting: A line for its pool's configuration.
    """

    counts = True
    health = "/health"
    keeps_connections = True
    _ready: ClassVar = re.compile(r"is ready at (http://\S+)")

    def __init__(self, name: str = "orchd", *, setting: str = "") -> None:
        self.name = name
        self._setting = setting
        self._token = secrets.token_urlsafe(24)
        self.headers: Mapping[str, str] = {"Authorization": f"Bearer {self._token}"}

    def command(self, setup: Setup, folder: Path, port: int) -> list[str]:
        config = folder / "orchd.toml"
        # No grace: a listener that hangs up cancels its task at once, as with the other servers.
        config.write_text(
            "[tasks]\ncancel_grace_s = 0\n"
            f"[[pools]]\nmodel = {json.dumps(str(setup.model))}\nslots = {setup.slots}\nctx = {setup.ctx}\n"
            f"threads = {setup.threads}\nbatch = {UBATCH}\nflash_attn = {json.dumps(setup.flash_attn)}\n"
            + ("" if setup.prompt_store else "prompt_cache_mib = 0\n")
            + self._setting
        )
        return [sys.executable, "-m", "orchd", "serve", "--config", str(config), "--port", "0"]

    def environment(self) -> dict[str, str]:
        return {"ORCHD_TOKEN": self._token}

    def url(self, log: str, port: int) -> str | None:
        found = self._ready.search(log)
        return found.group(1) if found else None

    @asynccontextmanager
    async def stream(self, session: aiohttp.ClientSession, task: Task) -> AsyncIterator[aiohttp.ClientResponse]:
        task_id = str(uuid.uuid4())
        body = {
            **{"task_id": task_id, "prompt": task.prompt, "max_tokens": task.max_tokens, "ignore_eos": True},
            **{"seed": task.seed, **task.sampling},
            **({} if task.json_schema is None else {"json_schema": task.json_schema}),
            **({"priority": "batch"} if task.batch else {}),
        }
        async with _answer(session, "POST", "/v1/tasks", 202, json=body) as answer:
            await answer.read()
        async with _answer(session, "GET", f"/v1/tasks/{task_id}/stream", 200) as response:
            yield response

    def read(self, event: bytes) -> Piece:
        if b"event: token\n" in event:
            return Piece(text=True)
        if b"event: end\n" not in event:
            return Piece(text=False)
        end = json.loads(event.partition(b"data: ")[2])
        if end["finish_reason"] != "length":
            raise RuntimeError(f"orchd ended a stream with {end}")
        return Piece(text=False, tokens_out=end["tokens_out"])


class LlamaServer:
    """``guesses`` is the kind of its guesses from the text (``--spec-type``); by default it makes none."""

    counts = True
    health = "/health"
    headers: Mapping[str, str] = {}
    keeps_connections = False  # it says that it does, and closes them at moments that a request can meet

    def __init__(self, binaries: Path, *, guesses: str = "") -> None:
        self.name = f"llama-server {guesses}".rstrip()
        self._guesses = guesses
        self._binary = binaries / "llama-server"

    def command(self, setup: Setup, folder: Path, port: int) -> list[str]:
        # With --parallel named, its KV cache is one buffer per slot of c / N tokens.
        command = [str(self._binary), "--model", str(setup.model), "--host", "127.0.0.1", "--port", str(port)]
        command += ["--parallel", str(setup.slots), "--ctx-size", str(setup.slots * setup.ctx)]
        command += ["--threads", str(setup.threads), "--threads-batch", str(setup.threads)]
        command += ["--batch-size", str(setup.peer_batch), "--ubatch-size", str(UBATCH), "--no-webui", "--offline"]
        command += ["--flash-attn", setup.flash_attn]
        command += ["--spec-type", self._guesses] if self._guesses else []
        return command if setup.prompt_store else [*command, "--cache-ram", "0"]

    def environment(self) -> dict[str, str]:
        return {}

    def url(self, log: str, port: int) -> str | None:
        return f"http://127.0.0.1:{port}"

    @asynccontextmanager
    async def stream(self, session: aiohttp.ClientSession, task: Task) -> AsyncIterator[aiohttp.ClientResponse]:
        body = {
            **{"prompt": task.prompt, "n_predict": task.max_tokens, "ignore_eos": True, "stream": True},
            **{"seed": task.seed, "repeat_penalty": 1.0, **task.sampling},
            **({} if task.json_schema is None else {"json_schema": task.json_schema}),
        }
        async with _answer(session, "POST", "/completion", 200, json=body) as response:
            yield response

    def read(self, event: bytes) -> Piece:
        if not event.startswith(b"data: "):
            raise RuntimeError(f"llama-server says {event.decode(errors='replace')}")
        data = json.loads(event[6:])
        return Piece(text=bool(data["content"]), tokens_out=data["tokens_predicted"] if data["stop"] else None)


class LlamaCppPython:
    name = "llama_cpp.server"
    counts = False
    health = "/v1/models"
    headers: Mapping[str, str] = {}
    keeps_connections = True

    def command(self, setup: Setup, folder: Path, port: int) -> list[str]:
        # One request at a time is all it can do; unless told otherwise it breaks off a stream when another request
        # comes. With logits_all it would compute and keep the logits of every prompt token.
        options: dict[str, object] = {"host": "127.0.0.1", "port": port, "model": setup.model, "n_ctx": setup.ctx}
        options |= {"n_threads": setup.threads, "n_threads_batch": setup.threads, "interrupt_requests": False}
        options |= {"n_batch": UBATCH, "n_ubatch": UBATCH, "logits_all": False}
        arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        return [sys.executable, "-m", "llama_cpp.server", *arguments]

    def environment(self) -> dict[str, str]:
        return {}

    def url(self, log: str, port: int) -> str | None:
        return f"http://127.0.0.1:{port}"

    @asynccontextmanager
    async def stream(self, session: aiohttp.ClientSession, task: Task) -> AsyncIterator[aiohttp.ClientResponse]:
        body = {
            "prompt": task.prompt,
            "max_tokens": task.max_tokens,
            "stream": True,
            "seed": task.seed,
            **task.sampling,
        }
        async with _answer(session, "POST", "/v1/completions", 200, json=body) as response:
            yield response

    def read(self, event: bytes) -> Piece:
        _, _, data = event.partition(b"data: ")
        if not data or data == b"[DONE]":
            return Piece(text=False)
        return Piece(text=bool(json.loads(data)["choices"][0]["text"]))


@asynccontextmanager
async def _answer(
    session: aiohttp.ClientSession, method: str, path: str, status: int, *, json: object = None
) -> AsyncIterator[aiohttp.ClientResponse]:
    """Send a request and check the answer's status."""
    async with session.request(method, path, json=json) as response:
        if response.status != status:
            raise RuntimeError(f"{method} {path} answered {response.status}: {await response.text()}")
        yield response
