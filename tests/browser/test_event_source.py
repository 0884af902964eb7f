"""A real browser's `EventSource` and `fetch`, from a page of another origin of this machine, and pages not let in."""

from __future__ import annotations

import pytest
from playwright.sync_api import Page

from testkit.account import EXAMPLES, ServerProcess
from testkit.process import free_port
from tests.browser.conftest import FOREIGN, GRACE_S, LONG, events_of, open_plain, until
from tests.browser.cutting_proxy import cutting

COLLECT = """([url, id, token]) => {
    globalThis.seen = [];
    globalThis.source = new EventSource(`${url}/v1/tasks/${id}/stream?access_token=${token}`);
    for (const type of ["started", "token", "end"])
        source.addEventListener(type, (e) => seen.push({ id: e.lastEventId, type, data: JSON.parse(e.data) }));
}"""
CLOSED = "source.readyState === EventSource.CLOSED"


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
    page.evaluate("(url) => { orchd.url = url; }", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(Exception, match="is orchd serve running there"):
        page.evaluate(f"orchd.{ask}('x')")


def test_closing_the_tab_cancels_the_task(page: Page, site: int, server: ServerProcess) -> None:
    open_plain(page, site)
    task = server.post("/v1/tasks", **LONG)["task_id"]
    page.evaluate(COLLECT, [server.url, task, server.token])
    page.wait_for_function("seen.length > 3")
    page.close()
    until(lambda: server.busy() == 0, "the slot is free", GRACE_S + 5)
    assert events_of(server, task)[-1]["data"]["finish_reason"] == "cancelled"


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
