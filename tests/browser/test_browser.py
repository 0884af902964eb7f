"""A real browser, the example page, and a real server. The page and the server are two origins of this machine."""

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
from tests.browser.cutting_proxy import cutting

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None and "CI" not in os.environ, reason="no Chromium; sudo apt install chromium"
)

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


@pytest.fixture(scope="module")
def server(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    config = f"[tasks]\ncancel_grace_s = {GRACE_S}\n"
    with serving(tmp_path_factory.mktemp("home"), tiny_model_path, config, "slots = 2\nctx = 65536") as process:
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
    # Not for the session: while Playwright's synchronous API is open, no async test can run.
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM, args=[*FLAGS, f"--host-resolver-rules=MAP {FOREIGN} 127.0.0.1"]
        )
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    context = browser.new_context(color_scheme="light", viewport={"width": 900, "height": 760})
    context.set_default_timeout(20_000)
    expect.set_options(timeout=20_000)
    yield context.new_page()
    context.close()


def open_chat(page: Page, site: int, server: ServerProcess, *, token: str | None = None) -> None:
    """The example page, told where the server is."""
    page.goto(f"http://localhost:{site}/")
    for field, value in (("#url", server.url), ("#token", token or server.token)):
        page.fill(field, value)
        page.dispatch_event(field, "change")


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


COLLECT = """([url, id, token]) => {
    globalThis.seen = [];
    globalThis.source = new EventSource(`${url}/v1/tasks/${id}/stream?access_token=${token}`);
    for (const type of ["started", "token", "end"])
        source.addEventListener(type, (e) => seen.push({ id: e.lastEventId, type, data: JSON.parse(e.data) }));
}"""
CLOSED = "source.readyState === EventSource.CLOSED"


# The page


def test_the_page_streams_an_answer_from_another_origin(page: Page, site: int, server: ServerProcess) -> None:
    errors: list[object] = []
    page.on("pageerror", lambda error: errors.append(error))
    open_chat(page, site, server)
    expect(page.locator("#state")).to_contain_text("tiny-llama")
    page.evaluate("document.getElementById('settings').open = true")
    page.fill("#max", "40")
    page.fill("#temperature", "0")
    page.fill("#prompt", "Where is the river?")
    page.press("#prompt", "Enter")
    expect(page.locator(".meta")).to_contain_text("tokens")
    messages = [{"role": "user", "content": "Where is the river?"}]
    task = server.post("/v1/tasks", messages=messages, max_tokens=40, temperature=0)["task_id"]
    expected = "".join(event["data"]["t"] for event in events_of(server, task) if event["type"] == "token")
    assert expected
    assert page.locator(".turn").last.locator("div").first.text_content() == expected
    assert errors == []


def test_the_stop_button_ends_the_task_on_the_server(page: Page, site: int, server: ServerProcess) -> None:
    open_chat(page, site, server)
    page.fill("#max", "60000")
    page.fill("#prompt", "river")
    page.press("#prompt", "Enter")
    expect(page.locator(".live")).not_to_be_empty()
    page.click("#stop")
    expect(page.locator(".meta")).to_have_text("stopped")
    until(lambda: server.busy() == 0, "the slot is free", GRACE_S + 5)


def test_the_page_says_what_is_wrong_with_the_token(page: Page, site: int, server: ServerProcess) -> None:
    open_chat(page, site, server, token="not-the-token-0123456789")
    expect(page.locator("#status")).to_have_class("bad")
    expect(page.locator("#state")).to_contain_text("token")


def test_the_page_shows_a_refusal_as_a_sentence(page: Page, site: int, server: ServerProcess) -> None:
    open_chat(page, site, server)
    expect(page.locator("#status")).to_have_class("ok")
    page.fill("#max", "70000")
    page.fill("#prompt", "river")
    page.press("#prompt", "Enter")
    expect(page.locator(".meta.bad")).to_contain_text("do not fit into a slot's context")


def test_the_page_is_dark_or_light_as_one_likes(page: Page, site: int) -> None:
    page.goto(f"http://localhost:{site}/")

    def paper() -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    light = paper()
    page.click("#theme")
    dark = paper()
    assert dark != light
    page.reload()
    assert paper() == dark


# EventSource and fetch


def test_event_source_gets_everything_once_in_order_and_stops(page: Page, site: int, server: ServerProcess) -> None:
    open_plain(page, site)
    task = server.post("/v1/tasks", prompt="the river", max_tokens=50, ignore_eos=True)["task_id"]
    page.evaluate(COLLECT, [server.url, task, server.token])
    page.wait_for_function(CLOSED)  # it came back after the end, and was told 204
    seen = page.evaluate("seen")
    assert seen == events_of(server, task)
    assert [event["id"] for event in seen] == [str(number) for number in range(len(seen))]
    kinds = [event["type"] for event in seen]
    assert kinds == ["started", *["token"] * (len(kinds) - 2), "end"]
    indices = [event["data"]["i"] for event in seen[1:-1]]
    assert indices == sorted(set(indices))


def test_a_cut_connection_loses_and_doubles_nothing(page: Page, site: int, server: ServerProcess) -> None:
    open_plain(page, site)
    with cutting(server.port, where="/stream", after_bytes=3001) as proxy:
        task = server.post("/v1/tasks", prompt="the river", max_tokens=300, ignore_eos=True)["task_id"]
        page.evaluate(COLLECT, [f"http://127.0.0.1:{proxy.port}", task, server.token])
        page.wait_for_function("seen.some((event) => event.type === 'end')")
        assert proxy.cuts == 1
        before, after, *_ = proxy.requests
        assert b"last-event-id" not in before.lower()
        assert b"last-event-id: " in after.lower()
        assert page.evaluate("seen") == events_of(server, task)


def test_the_page_takes_up_an_answer_after_a_cut(page: Page, site: int, server: ServerProcess) -> None:
    with cutting(server.port, where="/stream", after_bytes=2000) as proxy:
        open_chat(page, site, server)
        page.fill("#url", f"http://127.0.0.1:{proxy.port}")
        page.fill("#max", "200")
        page.fill("#prompt", "river")
        page.press("#prompt", "Enter")
        expect(page.locator(".meta")).to_contain_text("reconnecting")
        expect(page.locator(".meta")).to_contain_text("tokens")
        assert proxy.cuts == 1


@pytest.mark.parametrize("ask", ["ask", "askWithFetch"])
def test_the_snippet_for_the_console(page: Page, site: int, server: ServerProcess, ask: str) -> None:
    open_plain(page, site)
    page.evaluate((EXAMPLES / "browser/devtools.js").read_text())
    page.evaluate("([url, token]) => Object.assign(orchd, { url, token })", [server.url, server.token])
    answer = page.evaluate(f"orchd.{ask}('Where is the river?', {{ max_tokens: 20, temperature: 0 }})")
    assert answer["text"]
    assert answer["finish_reason"] in ("length", "stop")
    with pytest.raises(Exception, match="INVALID_PARAMS: "):
        page.evaluate(f"orchd.{ask}('x', {{ max_tokens: 0 }})")


def test_closing_the_tab_cancels_the_task(page: Page, site: int, server: ServerProcess) -> None:
    open_plain(page, site)
    task = server.post("/v1/tasks", **LONG)["task_id"]
    page.evaluate(COLLECT, [server.url, task, server.token])
    page.wait_for_function("seen.length > 3")
    page.close()
    until(lambda: server.busy() == 0, "the slot is free", GRACE_S + 5)
    assert events_of(server, task)[-1]["data"]["finish_reason"] == "cancelled"


# Pages that should not get in


def test_a_page_of_a_foreign_origin_is_refused_by_cors(page: Page, site: int, server: ServerProcess) -> None:
    open_plain(page, site, FOREIGN)
    assert page.evaluate("location.origin") == f"http://{FOREIGN}:{site}"
    fetching = """([url, token]) => fetch(`${url}/health`, { headers: { Authorization: `Bearer ${token}` } })
        .then(() => "answered", (error) => error.name)"""
    assert page.evaluate(fetching, [server.url, server.token]) == "TypeError"
    task = server.post("/v1/tasks", prompt="the river", max_tokens=5)["task_id"]
    page.evaluate(COLLECT, [server.url, task, server.token])
    page.wait_for_function(CLOSED)
    assert page.evaluate("seen") == []


def test_a_foreign_name_for_this_machine_is_refused_by_the_host_check(page: Page, server: ServerProcess) -> None:
    """DNS rebinding: the browser takes the server for the foreign page's own, so that no CORS would apply."""
    answer = page.goto(f"http://{FOREIGN}:{server.port}/health")
    assert answer is not None
    assert answer.status == 403
    assert answer.json()["code"] == "FORBIDDEN"
    fetching = "(token) => fetch('/health', { headers: { Authorization: `Bearer ${token}` } }).then((a) => a.status)"
    assert page.evaluate(fetching, server.token) == 403


def test_a_closed_tab_whose_page_says_so_frees_its_slot_at_once(page: Page, site: int, server: ServerProcess) -> None:
    open_plain(page, site)
    task = server.post("/v1/tasks", **LONG)["task_id"]
    page.evaluate(
        "([url, id, token]) => {"
        " globalThis.source = new EventSource("
        "`${url}/v1/tasks/${id}/stream?access_token=${token}&cancel_grace_s=0`); }",
        [server.url, task, server.token],
    )
    until(lambda: page.evaluate("source.readyState === EventSource.OPEN"), "the stream is open")
    assert server.busy() == 1
    page.close()
    until(lambda: server.busy() == 0, "the slot is free", limit_s=GRACE_S - 0.5)
    assert events_of(server, task)[-1]["data"]["finish_reason"] == "cancelled"
