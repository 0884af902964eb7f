"""The chat page on three screens, in two colour schemes, with a keyboard, and read aloud."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from testkit.account import ServerProcess
from tests.browser.conftest import until
from tests.browser.test_page import STARTED, answered, ask, open_chat, said, settle, streamed

LEAST_CONTRAST = 4.5
"""WCAG 2.2, level AA, for text of this size."""

TEXTS = (
    "#state, #empty p, #ideas button, .question, .answer, details, .reasoning, .note, .meta button, #send, #prompt, h1"
)


@pytest.fixture(params=[(390, 760), (768, 900), (1280, 800)], ids=lambda size: str(size[0]))
def size(request: pytest.FixtureRequest) -> tuple[int, int]:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def screen(browser: Browser, size: tuple[int, int]) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": size[0], "height": size[1]})
    yield context.new_page()
    context.close()


def assert_fits(page: Page, *controls: str) -> None:
    """Nothing is wider than the screen, and what one needs is on it."""
    width, height = page.evaluate("[innerWidth, innerHeight]")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for name in controls:
        box = page.get_by_role("button", name=name, exact=True).bounding_box()
        assert box is not None, name
        assert box["x"] >= 0, name
        assert box["x"] + box["width"] <= width, name
        assert box["y"] + box["height"] <= height, name


def test_everything_is_on_the_screen(screen: Page, site: int, server: ServerProcess) -> None:
    screen.goto(f"http://localhost:{site}/")
    assert_fits(screen, "Done")
    open_chat(screen, site, server, url="http://127.0.0.1:9", most=60_000)
    expect(screen.get_by_role("alert")).to_be_visible()
    assert_fits(screen, "Send", "Settings")
    open_chat(screen, site, server, most=60_000)
    ask(screen, "a-word-that-is-longer-than-a-telephone-is-wide-" * 4)
    expect(screen.locator(".answer")).not_to_be_empty()
    assert_fits(screen, "Stop", "Settings", "New chat")
    screen.get_by_role("button", name="Stop").click()
    answered(screen)
    assert_fits(screen, "Send", "Continue", "Try again")
    _think(screen, server, "a-thought-that-is-longer-than-a-telephone-is-wide-" * 4)
    assert_fits(screen, "Send", "Settings")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(page: Page, site: int, server: ServerProcess, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    open_chat(page, site, server, most=5)
    assert _contrasts(page)
    ask(page, "river")
    answered(page)
    expect(page.locator("#send")).to_be_visible()
    _think(page, server, "Two rivers.")
    assert "reasoning" in _contrasts(page)
    for text, contrast in _contrasts(page).items():
        assert contrast >= LEAST_CONTRAST, text


def test_it_is_dark_or_light_as_one_likes(page: Page, site: int) -> None:
    page.goto(f"http://localhost:{site}/")
    page.keyboard.press("Escape")

    def paper() -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    light = paper()
    page.get_by_role("button", name="Switch between dark and light").click()
    dark = paper()
    assert dark != light
    page.reload()
    assert paper() == dark


def test_a_keyboard_is_enough(page: Page, site: int, server: ServerProcess) -> None:
    open_chat(page, site, server, most=60_000)
    expect(page.get_by_role("textbox", name="Your message")).to_be_focused()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    expect(page.locator(".question")).to_have_text("one\ntwo", use_inner_text=True)
    expect(page.locator(".answer")).not_to_be_empty()
    page.keyboard.press("Escape")
    expect(page.locator(".note")).to_have_text("Stopped.")
    page.keyboard.press("Shift+Tab")
    expect(page.get_by_role("button", name="Try again")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#stop")).to_be_visible()
    expect(page.get_by_role("textbox", name="Your message")).to_be_focused()  # its button is gone
    page.keyboard.press("Escape")
    answered(page)


def test_an_answer_is_read_aloud_once_and_whole(page: Page, site: int, server: ServerProcess) -> None:
    open_chat(page, site, server, most=20)
    ask(page, "river")
    answer = answered(page)
    expect(page.get_by_role("status")).to_have_text(f"Answer: {answer}", use_inner_text=False)
    assert said(page).count("Answer: ") == 1
    assert page.locator("[aria-live], [role=status], [role=alert], [role=log]").count() == 3  # none around the answer
    article = page.get_by_role("article")
    expect(article.get_by_role("heading")).to_have_text(["You", "Answer"])


def test_a_reader_further_up_is_left_there(page: Page, site: int, server: ServerProcess) -> None:
    page.set_viewport_size({"width": 390, "height": 500})
    open_chat(page, site, server, most=60_000)
    ask(page, "river")
    until(lambda: page.evaluate("document.documentElement.scrollHeight > 3 * innerHeight"), "a long answer")
    page.mouse.wheel(0, -2000)
    page.evaluate("scrollTo(0, 0)")
    height = page.evaluate("document.documentElement.scrollHeight")
    until(lambda: page.evaluate("document.documentElement.scrollHeight") > height + 200, "more of the answer")
    assert page.evaluate("scrollY") == 0
    page.get_by_role("button", name="Scroll to the end").click()
    until(lambda: page.evaluate("scrollY > 100"), "the end")
    page.keyboard.press("Escape")
    answered(page)


def _think(page: Page, server: ServerProcess, thought: str) -> None:
    """Ask once more; the answer has thoughts before it, which are looked at."""
    settle(page, max="5")  # what the server computes meanwhile, nobody listens to
    until(lambda: server.busy() == 0, "every slot is free")
    end = {"tokens_out": 2, "decode_ms": 9, "finish_reason": "length"}
    streamed(page, STARTED, ("token", {"r": thought, "i": 0}), ("token", {"t": "The Rhine.", "i": 1}), ("end", end))
    ask(page, "and now?")
    assert answered(page) == "The Rhine."
    page.locator(".thoughts summary").last.click()
    expect(page.locator(".reasoning").last).to_be_visible()


def _contrasts(page: Page) -> dict[str, float]:
    """The contrast of each visible text with what is behind it."""
    found = page.evaluate(
        """(selector) => [...document.querySelectorAll(selector)].filter((e) => e.checkVisibility()).map((e) => {
            let behind = e;
            while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
            const name = e.id || e.className || e.textContent;
            return [name, getComputedStyle(e).color, getComputedStyle(behind).backgroundColor];
        })""",
        TEXTS,
    )
    return {text: _contrast(ink, paper) for text, ink, paper in found}


def _contrast(ink: str, paper: str) -> float:
    """Of two colours such as ``rgb(29, 33, 37)``; WCAG's formula."""
    dark, light = sorted((_luminance(ink), _luminance(paper)))
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    channels = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
