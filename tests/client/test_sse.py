"""The reader of event streams: the same events however the bytes were cut."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchd.client.sse import ServerEvent, SseReader


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


def read(chunks: list[bytes]) -> list[ServerEvent]:
    reader = SseReader()
    return [event for chunk in chunks for event in reader.feed(chunk)]


LINE = st.one_of(
    st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=20),
    st.builds(
        "{}:{}{}".format,
        st.sampled_from(["data", "event", "id", "retry", "", "other"]),
        st.sampled_from(["", " "]),
        st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=20),
    ),
    st.just(""),
)
STREAM = st.lists(st.tuples(LINE, st.sampled_from(["\n", "\r\n", "\r"]))).map(
    lambda lines: "".join(line + ending for line, ending in lines).encode()
)


@given(STREAM, st.lists(st.integers(min_value=0)))
def test_any_chunking_gives_the_same_events(data: bytes, places: list[int]) -> None:
    assert read(cut(data, places)) == read([data])


@given(STREAM)
def test_byte_by_byte_gives_the_same_events(data: bytes) -> None:
    assert read([bytes([byte]) for byte in data]) == read([data])


@given(st.binary(max_size=200), st.lists(st.integers(min_value=0)))
def test_the_reader_takes_any_bytes(data: bytes, places: list[int]) -> None:
    assert read(cut(data, places)) == read([data])


@given(st.lists(st.text(st.characters(exclude_characters="\r\n\0", exclude_categories=["Cs"]), min_size=1)))
def test_what_a_server_writes_is_what_is_read(pieces: list[str]) -> None:
    data = "".join(f"id: {n}\nevent: token\ndata: {piece}\n\n" for n, piece in enumerate(pieces)).encode()
    assert read([data]) == [ServerEvent(str(n), "token", piece) for n, piece in enumerate(pieces)]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_every_line_ending_counts(newline: str) -> None:
    data = newline.join([": hello", "id: 7", "event: token", "data: a", "data: b", "", ""]).encode()
    assert read([data]) == [ServerEvent("7", "token", "a\nb")]


def test_half_an_event_is_no_event() -> None:
    assert read([b"id: 1\nevent: token\ndata: half\n"]) == []


def test_comments_and_events_without_data_are_left_out_and_the_id_stays() -> None:
    assert read([b": comment\n\nid: 3\n\ndata: x\n\n"]) == [ServerEvent("3", "message", "x")]


def test_a_byte_order_mark_is_skipped_once() -> None:
    assert read([b"\xef\xbb\xbfdata: x\n\n"]) == [ServerEvent(None, "message", "x")]


@pytest.mark.parametrize("data", [b"data: " + b"x" * 200, b"data: xxxxxxxxxx\n" * 20])
def test_an_endless_event_is_an_error(data: bytes) -> None:
    with pytest.raises(ValueError, match="longer than 100 bytes"):
        SseReader(max_event_bytes=100).feed(data)


@given(st.lists(st.integers(min_value=0)))
def test_comments_are_handed_over_and_are_no_events(places: list[int]) -> None:
    comments: list[str] = []
    reader = SseReader(on_comment=comments.append)
    data = b": prompt 1/5\n\nid: 0\ndata: x\n: another\n\n"
    events = [event for chunk in cut(data, places) for event in reader.feed(chunk)]
    assert comments == ["prompt 1/5", "another"]
    assert events == [ServerEvent("0", "message", "x")]
