"""What a model writes under the schema of tools, in pieces of any size."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET

from orchd.openai.answers import Delta
from orchd.openai.decision import DecisionReader

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.from_regex(r"\A[A-Za-z0-9_-]{1,10}\Z")
CUTS = st.lists(st.integers(0, 200), max_size=12)


def read(text: str, cuts: list[int], stop: Sequence[str] = ()) -> list[Delta]:
    reader = DecisionReader(stop)
    ends = sorted({cut for cut in cuts if cut < len(text)} | {len(text)})
    begins = [0, *ends]
    return [delta for begin, end in zip(begins, ends, strict=False) for delta in reader.feed(text[begin:end])]


def content(deltas: list[Delta]) -> str:
    return "".join(delta.content or "" for delta in deltas)


def calls(deltas: list[Delta]) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    ids: set[object] = set()
    for delta in deltas:
        for call in delta.tool_calls or ():
            if call.function.name is not UNSET:
                assert call.index == len(found)
                assert call.id not in ids
                ids.add(call.id)
                found.append((call.function.name, ""))
            name, arguments = found[call.index]
            found[call.index] = (name, arguments + call.function.arguments)
    return found


@given(st.text(), st.booleans(), CUTS)
def test_a_reply_is_its_text(text: str, ascii_only: bool, cuts: list[int]) -> None:
    deltas = read(json.dumps({"content": text}, ensure_ascii=ascii_only), cuts)
    assert content(deltas) == text
    assert calls(deltas) == []


@given(
    st.lists(st.tuples(st.from_regex(r"\A[A-Za-z0-9_-]{1,10}\Z"), JSON), min_size=1, max_size=3), CUTS, st.booleans()
)
def test_calls_are_names_and_arguments(made: list[tuple[str, Any]], cuts: list[int], wide: bool) -> None:
    value = {"tool_calls": [{"name": name, "arguments": arguments} for name, arguments in made]}
    text = json.dumps(value, indent=2 if wide else None, separators=None if wide else (",", ":"))
    deltas = read(text, cuts)
    assert [(name, json.loads(arguments)) for name, arguments in calls(deltas)] == made
    assert content(deltas) == ""


@given(st.dictionaries(st.text(max_size=5), JSON, max_size=3), CUTS)
def test_a_reply_that_must_be_json_is_that_json(value: dict[str, Any], cuts: list[int]) -> None:
    assert json.loads(content(read(json.dumps({"content": value}), cuts))) == value


@given(st.text(min_size=1), st.integers(0, 60))
def test_a_reply_that_is_cut_off_is_the_beginning_of_its_text(text: str, length: int) -> None:
    written = json.dumps({"content": text})[: len('{"content": "') + length]
    assert text.startswith(content(read(written, [])))


@pytest.mark.parametrize(
    ("written", "text"),
    [
        (r'{"content": "a\ud83d\ude00b"}', "a\U0001f600b"),
        (r'{"content": "a\ud83db"}', "a\ufffdb"),
        (r'{"content": "\ud83d\n"}', "\ufffd\n"),
        (r'{"content": "\ud83d\ud83d\ude00"}', "\ufffd\U0001f600"),
        (r'{"content": "\ude00"}', "\ufffd"),
        (r'{"content": "\ud83d"}', "\ufffd"),
        (r'{"content": "\\ud83d"}', "\\ud83d"),
        ('{"content": "a\tb"}', "a\tb"),
    ],
)
def test_halves_of_characters_are_replaced_and_pairs_are_not(written: str, text: str) -> None:
    for size in (1, 2, 3, 5, 100):
        assert content(read(written, list(range(0, len(written), size)))) == text


def test_text_is_told_as_soon_as_it_is_certain() -> None:
    reader = DecisionReader()
    assert [reader.feed(piece) for piece in ('{"cont', 'ent":', '"')] == [[], [], []]
    assert content(reader.feed("Hel")) == "Hel"
    assert content(reader.feed("lo\\")) == "lo"
    assert content(reader.feed("n.")) == "\n."


def test_a_call_is_told_with_its_name() -> None:
    reader = DecisionReader()
    assert reader.feed('{"tool_calls":[{"name":"weather","argu') == []
    [begin, more] = reader.feed('ments":{"city":"Pa')
    assert calls([begin, more]) == [("weather", '{"city":"Pa')]
    assert reader.calls == 1


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3), CUTS)
def test_a_reply_ends_before_the_first_stop_text(text: str, stop: list[str], cuts: list[int]) -> None:
    first = min([at for one in stop if (at := text.find(one)) >= 0], default=len(text))
    assert content(read(json.dumps({"content": text}), cuts, stop)) == text[:first]
