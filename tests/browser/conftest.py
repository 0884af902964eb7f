"""A real Chromium, the files of `examples/browser`, and a real server: two origins of this machine."""

from __future__ import annotations

import functools
import http.server
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from testkit.account import EXAMPLES, ServerProcess, serving
from testkit.tiny_gguf import CHATML, write_tiny_llama

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
FOREIGN = "foreign.test"
GRACE_S = 4.0
"""Longer than Chromium's 3 s before it reconnects an `EventSource`."""

LONG = {"prompt": "the river", "max_tokens": 60_000, "ignore_eos": True}
"""A task that runs for much longer than the grace."""

QUEUE = 2
SLOTS = 2


@pytest.fixture(scope="module")
def server(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    config = f"[tasks]\ncancel_grace_s = {GRACE_S}\n[queue]\ncapacity = {QUEUE}\n"
    pool = f"slots = {SLOTS}\nctx = 65536"
    with serving(tmp_path_factory.mktemp("home"), tiny_model_path, config, pool) as process:
        yield process


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server whose model thinks, and never comes to an answer."""
    home = tmp_path_factory.mktemp("thinking")
    opened = "{% set history = '</think>' %}{% if add_generation_prompt %}<think>{% endif %}"
    path = write_tiny_llama(home / "thinks.gguf", chat_template=CHATML + opened)
    with serving(home, path) as process:
        yield process


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None: ...


@pytest.fixture(scope="module")
def site() -> Iterator[int]:
    """The port where `examples/browser` is served."""
    handler = functools.partial(_Quiet, directory=str(EXAMPLES / "browser"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as files:
        thread = threading.Thread(target=files.serve_forever)
        thread.start()
        yield files.server_address[1]
        files.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None and "CI" not in os.environ:
        pytest.skip("no Chromium; sudo apt install chromium")
    # Not for the session: while Playwright's synchronous API is open, no async test can run.
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM, args=[*FLAGS, f"--host-resolver-rules=MAP {FOREIGN} 127.0.0.1"]
        )
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page on which no script may fail."""
    context = browser.new_context(color_scheme="light", viewport={"width": 900, "height": 760})
    context.set_default_timeout(20_000)
    expect.set_options(timeout=20_000)
    errors: list[object] = []
    context.on("weberror", lambda error: errors.append(error.error))
    yield context.new_page()
    context.close()
    assert errors == []


def open_plain(page: Page, site: int, host: str = "localhost") -> None:
    """A page without scripts, on whose console one can type."""
    page.goto(f"http://{host}:{site}/devtools.js")


def until(condition: Any, what: str, limit_s: float = 20) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {limit_s} s"
        time.sleep(0.05)


def events_of(server: ServerProcess, task_id: str) -> list[dict[str, Any]]:
    """What the server tells anybody of an ended task."""
    text = server.get(f"/v1/tasks/{task_id}/stream")[1].decode()
    blocks = [dict(line.split(": ", 1) for line in block.splitlines()) for block in text.split("\n\n") if block]
    return [{"id": block["id"], "type": block["event"], "data": json.loads(block["data"])} for block in blocks]
