"""The chat page of `examples/browser` in a real Chromium, against a real server."""

from __future__ import annotations

import contextlib
import json
import urllib.request
from collections.abc import Iterator
from typing import Any

from playwright.sync_api import Page, Request, expect

from testkit.account import EXAMPLES, ServerProcess
from testkit.process import free_port
from tests.browser.conftest import FOREIGN, GRACE_S, LONG, QUEUE, SLOTS, events_of, until
from tests.browser.cutting_proxy import cutting

SAID = """() => {
    globalThis.said = [];
    new MutationObserver((changes) => {
        for (const { target } of changes) {
            const within = target.closest?.(".note, #live") ?? target.parentElement?.closest(".note, #live");
            if (within?.textContent) said.push(within.textContent);
        }
    }).observe(document.body, { subtree: true, childList: true, characterData: true });
}"""
"""Keeps every line that the page shows under an answer or tells a screen reader, however short it stays."""


def open_chat(page: Page, site: int, server: ServerProcess, *, url: str = "", token: str = "", most: int = 40) -> None:
    """The page as it is after its settings were filled in."""
    page.goto(f"http://localhost:{site}/")
    settle(page, url=url or server.url, token=token or server.token, max=str(most), temperature="0")
    page.evaluate(SAID)


def settle(page: Page, **values: str) -> None:
    if not page.locator("#settings").is_visible():
        page.get_by_role("button", name="Settings").click()
    for field, value in values.items():
        page.fill(f"#{field}", value)
    page.get_by_role("button", name="Done").click()


def ask(page: Page, question: str) -> None:
    page.get_by_role("textbox", name="Your message").fill(question)
    page.keyboard.press("Enter")


def answered(page: Page) -> str:
    """The last answer, when it is there."""
    expect(page.locator("#send")).to_be_visible(timeout=60_000)
    return page.locator(".answer").last.text_content() or ""


def task_of(request: Request) -> dict[str, Any]:
    """What was submitted."""
    body = request.post_data_json
    assert isinstance(body, dict)
    return body


def said(page: Page) -> str:
    return "\n".join(page.evaluate("said"))


@contextlib.contextmanager
def full(server: ServerProcess, *, waiting: int = QUEUE) -> Iterator[None]:
    """All slots are taken, and so many places in the queue; whoever has them leaves at the end."""
    until(lambda: server.busy() == 0, "every slot is free")
    streams = []
    for number in range(SLOTS + waiting):
        task = server.post("/v1/tasks", **LONG)["task_id"]
        request = urllib.request.Request(f"{server.url}/v1/tasks/{task}/stream")
        request.add_header("Authorization", f"Bearer {server.token}")
        streams.append(urllib.request.urlopen(request, timeout=20))
        until(lambda number=number: server.busy() == min(number + 1, SLOTS), "the task runs")
    try:
        yield
    finally:
        for stream in streams:
            stream.close()


# A conversation


def test_it_streams_an_answer_from_another_origin(page: Page, site: int, server: ServerProcess) -> None:
    open_chat(page, site, server)
    expect(page.locator("#state")).to_contain_text("tiny-llama")
    ask(page, "Where is the river?")
    answer = answered(page)
    expect(page.locator(".note")).to_contain_text("tokens")
    messages = [{"role": "user", "content": "Where is the river?"}]
    task = server.post("/v1/tasks", messages=messages, max_tokens=40, temperature=0)["task_id"]
    expected = "".join(event["data"]["t"] for event in events_of(server, task) if event["type"] == "token")
    assert expected
    assert answer == expected


def test_a_conversation_outlives_a_reload_and_goes_on(page: Page, site: int, server: ServerProcess) -> None:
    open_chat(page, site, server, most=10)
    ask(page, "one")
    answered(page)
    page.get_by_role("textbox", name="Your message").fill("half a thought")
    page.reload()
    expect(page.locator(".turn")).to_have_count(1)
    expect(page.get_by_role("textbox", name="Your message")).to_have_value("half a thought")
    with page.expect_request("**/v1/tasks") as sent:
        ask(page, "two")
    messages = task_of(sent.value)["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert [messages[0]["content"], messages[2]["content"]] == ["one", "two"]
    answered(page)
    expect(page.locator(".turn")).to_have_count(2)


def test_earlier_chats_are_offered_and_can_be_deleted(page: Page, site: int, server: ServerProcess) -> None:
    open_chat(page, site, server, most=5)
    ask(page, "the first chat")
    answered(page)
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".turn")).to_have_count(0)
    tab = page.context.new_page()
    tab.goto(f"http://localhost:{site}/")
    tab.keyboard.press("Escape")  # it asks for the token, which stays in its tab unless told otherwise
    tab.get_by_role("button", name="the first chat").click()
    expect(tab.locator(".question")).to_have_text("the first chat")
    tab.get_by_role("button", name="New chat").click()
    tab.get_by_role("button", name="Delete all").click()
    expect(tab.get_by_role("button", name="the first chat")).to_have_count(0)
    assert [key for key in tab.evaluate("Object.keys(localStorage)") if "chat" in key] == []


def test_a_reload_takes_up_the_answer_that_is_being_written(page: Page, site: int, server: ServerProcess) -> None:
    open_chat(page, site, server, most=1500)
    with page.expect_request("**/v1/tasks") as sent:
        ask(page, "river")
    expect(page.locator(".answer")).not_to_be_empty()
    page.reload()
    answer = answered(page)
    events = events_of(server, task_of(sent.value)["task_id"])
    assert answer == "".join(event["data"]["t"] for event in events if event["type"] == "token")
    assert events[-1]["data"]["finish_reason"] != "cancelled"


def test_an_answer_can_be_continued_and_tried_again(page: Page, site: int, server: ServerProcess) -> None:
    open_chat(page, site, server, most=5)
    ask(page, "river")
    before = answered(page)
    with page.expect_request("**/v1/tasks") as sent:
        page.get_by_role("button", name="Continue").click()
    assert task_of(sent.value)["messages"][-1] == {"role": "assistant", "content": before}
    longer = answered(page)
    assert longer.startswith(before)
    assert len(longer) > len(before)
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".answer")).to_have_text(before, use_inner_text=False)
    expect(page.locator(".turn")).to_have_count(1)


# What the model thinks


def streamed(page: Page, *events: tuple[str, dict[str, Any]]) -> None:
    """Every stream from now on is these events."""
    body = "".join(
        f"id: {number}\nevent: {kind}\ndata: {json.dumps(data)}\n\n" for number, (kind, data) in enumerate(events)
    )
    headers = {"Access-Control-Allow-Origin": "*"}
    page.route("**/stream", lambda route: route.fulfill(body=body, content_type="text/event-stream", headers=headers))


STARTED = ("started", {"queue_position": 0, "predicted_start_ms": 0})


def test_what_a_model_thinks_is_apart_from_its_answer_and_folded(page: Page, site: int, server: ServerProcess) -> None:
    open_chat(page, site, server)
    until(lambda: server.busy() == 0, "every slot is free")
    end = {"tokens_out": 3, "decode_ms": 9, "finish_reason": "stop"}
    thoughts = [("token", {"r": "Two ", "i": 0}), ("token", {"r": "rivers.", "i": 1})]
    streamed(page, STARTED, *thoughts, ("token", {"t": "The Rhine.", "i": 2}), ("end", end))
    ask(page, "river")
    assert answered(page) == "The Rhine."
    expect(page.get_by_role("status")).to_have_text("Answer: The Rhine.")
    expect(page.locator(".reasoning")).to_be_hidden()
    page.get_by_text("What the model thought").click()
    expect(page.locator(".reasoning")).to_have_text("Two rivers.")
    page.unroute("**/stream")
    page.reload()
    expect(page.locator(".reasoning")).to_have_text("Two rivers.", use_inner_text=False)
    with page.expect_request("**/v1/tasks") as sent:
        ask(page, "and another one")
    task = task_of(sent.value)
    assert task["reasoning"] is True
    assert [message["content"] for message in task["messages"]] == ["river", "The Rhine.", "and another one"]
    answered(page)


def test_a_model_that_thinks_up_to_the_last_token_says_so(page: Page, site: int, thinking: ServerProcess) -> None:
    open_chat(page, site, thinking, most=5)
    ask(page, "river")
    assert answered(page) == ""
    expect(page.locator(".note")).to_contain_text("reached Max tokens while thinking")
    assert "Thinking, " in said(page)
    before = page.locator(".reasoning").text_content()
    assert before
    page.get_by_role("button", name="Try again").click()
    expect(page.locator("#send")).to_be_visible(timeout=60_000)
    assert page.locator(".reasoning").text_content() == before  # not twice


def test_an_answer_without_thoughts_has_no_place_for_them(page: Page, site: int, server: ServerProcess) -> None:
    open_chat(page, site, server, most=5)
    ask(page, "river")
    answered(page)
    expect(page.locator(".thoughts")).to_be_hidden()


# What holds an answer up


def test_stop_ends_the_task_on_the_server_and_keeps_the_answer(page: Page, site: int, server: ServerProcess) -> None:
    open_chat(page, site, server, most=60_000)
    ask(page, "river")
    expect(page.locator(".answer")).not_to_be_empty()
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".note")).to_have_text("Stopped.")
    expect(page.locator(".answer")).not_to_be_empty()
    until(lambda: server.busy() == 0, "the slot is free", GRACE_S + 5)


def test_the_place_in_the_queue_is_shown(page: Page, site: int, server: ServerProcess) -> None:
    open_chat(page, site, server)
    with full(server, waiting=1):
        ask(page, "river")
        expect(page.locator(".note")).to_contain_text("1 ahead in the queue")
    answered(page)
    assert "1 ahead in the queue." in said(page)


def test_a_full_queue_is_waited_for(page: Page, site: int, server: ServerProcess) -> None:
    open_chat(page, site, server)
    with full(server):
        ask(page, "river")
        expect(page.locator(".note")).to_contain_text("The queue is full; next try in")
    assert answered(page)  # long before the server expected it: the tasks were cancelled


def test_stop_also_ends_the_wait_for_a_full_queue(page: Page, site: int, server: ServerProcess) -> None:
    open_chat(page, site, server)
    with full(server):
        ask(page, "river")
        expect(page.locator(".note")).to_contain_text("The queue is full")
        page.keyboard.press("Escape")
        expect(page.locator(".note")).to_have_text("Stopped.")
        expect(page.get_by_role("button", name="Try again")).to_be_visible()


def test_progress_through_a_long_prompt_is_shown(page: Page, site: int, server: ServerProcess) -> None:
    """The server says it in comments of the stream."""
    open_chat(page, site, server)
    started = 'id: 0\nevent: started\ndata: {"queue_position":0,"predicted_start_ms":0}\n\n'
    end = 'id: 1\nevent: end\ndata: {"tokens_out":0,"decode_ms":0,"finish_reason":"stop"}\n\n'
    body = f"{started}: prompt 1024/6000\n\n: keep-alive\n\n{end}"
    headers = {"Access-Control-Allow-Origin": "*"}
    until(lambda: server.busy() == 0, "every slot is free")
    page.route("**/stream", lambda route: route.fulfill(body=body, content_type="text/event-stream", headers=headers))
    ask(page, "river")
    answered(page)
    assert "Reading, 1024 of 6000 tokens" in said(page)


def test_an_answer_is_taken_up_after_a_cut(page: Page, site: int, server: ServerProcess) -> None:
    with cutting(server.port, where="/stream", after_bytes=2000) as proxy:
        open_chat(page, site, server, url=f"http://127.0.0.1:{proxy.port}", most=200)
        with page.expect_request("**/v1/tasks") as sent:
            ask(page, "river")
        answer = answered(page)
        events = events_of(server, task_of(sent.value)["task_id"])
        assert answer == "".join(event["data"]["t"] for event in events if event["type"] == "token")
        assert "The connection broke; reconnecting …" in said(page)
        assert proxy.cuts == 1


def test_a_server_that_goes_away_leaves_a_sentence_and_what_was_there(
    page: Page, site: int, server: ServerProcess
) -> None:
    page.clock.install()
    with cutting(server.port, where="never", after_bytes=1) as proxy:
        open_chat(page, site, server, url=f"http://127.0.0.1:{proxy.port}", most=60_000)
        ask(page, "river")
        expect(page.locator(".answer")).not_to_be_empty()
    for _ in range(10):  # longer than it tries
        page.clock.run_for(5000)
    expect(page.locator(".note.bad")).to_contain_text("Is orchd serve running there?")
    expect(page.locator(".answer")).not_to_be_empty()


# What is wrong, in words


def test_a_wrong_token_is_told(page: Page, site: int, server: ServerProcess) -> None:
    open_chat(page, site, server, token="not-the-token-0123456789")
    expect(page.get_by_role("alert")).to_have_text("The server rejected this token; correct it in Settings.")
    ask(page, "river")
    expect(page.locator(".note.bad")).to_contain_text("rejected this token")
    page.get_by_role("button", name="Settings").click()
    expect(page.get_by_label("Token", exact=True)).to_have_attribute("aria-invalid", "true")
    settle(page, token=server.token)
    page.get_by_role("button", name="Try again").click()
    assert answered(page)


def test_no_token_is_asked_for_before_anything_is_sent(page: Page, site: int) -> None:
    page.goto(f"http://localhost:{site}/")
    expect(page.get_by_label("Token", exact=True)).to_be_focused()
    page.keyboard.press("Escape")
    ask(page, "river")
    expect(page.get_by_role("dialog", name="Settings")).to_be_visible()
    assert page.locator("#prompt").input_value() == "river"


def test_a_refusal_is_a_sentence_with_what_to_do(page: Page, site: int, server: ServerProcess) -> None:
    open_chat(page, site, server, most=70_000)
    ask(page, "river")
    expect(page.locator(".note.bad")).to_contain_text("do not fit into a slot's context")
    expect(page.locator(".note.bad")).to_contain_text("Start a new chat, or lower Max tokens in Settings.")
    settle(page, max="5")
    with page.expect_request("**/v1/tasks") as sent:
        ask(page, "another one")  # what was refused is no part of the conversation
    assert [message["content"] for message in task_of(sent.value)["messages"]] == ["another one"]
    assert answered(page)
    expect(page.locator(".turn")).to_have_count(1)


def test_no_server_is_told_and_the_answer_comes_when_there_is_one(page: Page, site: int, server: ServerProcess) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    open_chat(page, site, server, url=url)
    sentence = f"No answer from {url}. Is orchd serve running there?"
    expect(page.get_by_role("alert")).to_have_text(sentence)
    ask(page, "river")
    expect(page.locator(".note.bad")).to_have_text(sentence)
    settle(page, url=server.url)
    page.get_by_role("button", name="Try again").click()
    assert answered(page)


def test_a_page_of_a_foreign_origin_says_why_it_gets_nothing(page: Page, site: int, server: ServerProcess) -> None:
    page.goto(f"http://{FOREIGN}:{site}/")
    settle(page, url=server.url, token=server.token)
    expect(page.get_by_role("alert")).to_contain_text(f"pages from http://{FOREIGN}:{site}")
    expect(page.get_by_role("alert")).to_contain_text("server.allowed_origins")


def test_from_the_disk_it_says_how_it_can_be_opened(page: Page) -> None:
    page.goto((EXAMPLES / "browser" / "index.html").as_uri())
    expect(page.get_by_role("alert")).to_contain_text("Serve this page instead of opening the file")
    command = f"python3 -m http.server 8000 --bind 127.0.0.1 --directory {EXAMPLES / 'browser'}"
    expect(page.locator("#disk pre")).to_have_text(command)
    expect(page.locator("#prompt")).to_be_hidden()
