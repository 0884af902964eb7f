"""Tokens to text: whole characters only, and nothing of a stop string."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.llamacpp.text import OutputText, StopString


def shown(pieces: list[bytes], stop: tuple[str, ...] = ()) -> list[str]:
    """What each piece releases, and at last the flush; like the engine, stops after a stop string."""
    output = OutputText(stop)
    texts = []
    for piece in pieces:
        texts.append(output.push(piece))
        if output.stopped:
            return texts
    return [*texts, output.flush()]


def test_a_character_comes_with_its_last_byte() -> None:
    assert shown([bytes([byte]) for byte in "🙂".encode()]) == ["", "", "", "🙂", ""]


def test_bytes_after_whole_characters_wait_for_the_rest() -> None:
    assert shown([b"caf\xc3", b"\xa9!"]) == ["caf", "é!", ""]


def test_half_a_character_at_the_end_is_replaced() -> None:
    assert shown([b"a", "é".encode()[:1]]) == ["a", "", "\ufffd"]


def test_bytes_that_are_not_utf8_are_replaced_one_by_one() -> None:
    assert shown([b"a\xffb"]) == ["a\ufffdb", ""]


def test_text_ends_before_a_stop_string() -> None:
    assert shown([b"one END two"], ("END",)) == ["one "]


def test_a_stop_string_may_come_in_pieces() -> None:
    assert shown([b"one E", b"N", b"D"], ("END",)) == ["one ", "", ""]


def test_a_stop_string_may_come_in_bytes_of_a_character() -> None:
    assert shown([b"a\xf0\x9f", b"\x99\x82"], ("🙂",)) == ["a", ""]


def test_what_only_began_like_a_stop_string_is_shown_later() -> None:
    assert shown([b"one E", b"NT"], ("END",)) == ["one ", "ENT", ""]


def test_what_is_held_back_at_the_end_is_flushed() -> None:
    assert shown([b"one E", b"N"], ("END",)) == ["one ", "", "EN"]


def test_nothing_is_flushed_after_a_stop_string() -> None:
    output = OutputText(("END",))
    assert output.push(b"ENDED\xc3") == ""
    assert output.stopped
    assert output.flush() == ""


def test_a_stop_string_made_of_a_flushed_half_character_counts() -> None:
    assert shown([b"a", b"\xc3"], ("\ufffd",)) == ["a", "", ""]


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("aaab", ("aab",), "a"),  # a failed match is the beginning of the next
        ("abababac", ("ababac",), "ab"),
        ("xabcd", ("abcd", "bc"), "xa"),  # the first to be complete wins
        ("xabc", ("bc", "abc"), "x"),  # of two complete at once, the longer
        ("xabc", ("abc", "bc"), "x"),
        ("xaa", ("aa", "a"), "x"),
        ("abc", ("abd", "c"), "ab"),
        ("", ("a",), ""),
    ],
)
def test_overlapping_stops(text: str, stop: tuple[str, ...], expected: str) -> None:
    assert "".join(shown([text.encode()], stop)) == expected
    assert "".join(shown([char.encode() for char in text], stop)) == expected


def test_a_stop_string_is_found_again_after_it_was_complete() -> None:
    finder = StopString("aba")
    assert [finder.read(char) for char in "ababa"] == [False, False, True, False, True]


def test_the_index_is_that_of_the_last_token_shown() -> None:
    output = OutputText(("XYZ",))
    seen = []
    for piece in [b"a", b"b X", b"Y", b"X", b"\xf0\x9f", b"\x99\x82", b"X"]:
        seen.append((output.push(piece), output.index))
    seen.append((output.flush(), output.index))
    assert seen == [("a", 0), ("b ", 1), ("", 1), ("XY", 2), ("", 2), ("X🙂", 5), ("", 5), ("X", 6)]


def test_the_index_is_minus_one_before_any_text() -> None:
    output = OutputText(("XY",))
    output.push(b"X")
    assert output.index == -1
    output.push(b"Y")
    assert output.index == -1


def before_first_stop(text: str, stop: tuple[str, ...]) -> str:
    """By trying all: the text before the stop string that ends first, and of those the one that starts first."""
    for end in range(1, len(text) + 1):
        complete = [s for s in stop if text[:end].endswith(s)]
        if complete:
            return text[: end - max(map(len, complete))]
    return text


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(min(at, len(data)) for at in cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


texts = st.text("abé🙂 ", max_size=40) | st.text(max_size=20)
stops = st.lists(st.text("abé🙂 ", min_size=1, max_size=5) | st.text(min_size=1, max_size=2), max_size=4).map(tuple)
cuts = st.lists(st.integers(0, 100), max_size=30)


@given(texts, stops, cuts)
def test_output_is_the_text_before_the_first_complete_stop(text: str, stop: tuple[str, ...], cuts: list[int]) -> None:
    assert "".join(shown(cut(text.encode(), cuts), stop)) == before_first_stop(text, stop)


@given(st.binary(max_size=30), cuts)
def test_any_bytes_in_any_pieces_decode_like_the_whole(data: bytes, cuts: list[int]) -> None:
    assert "".join(shown(cut(data, cuts))) == data.decode("utf-8", "replace")


@given(texts, stops, cuts)
def test_nothing_is_held_back_that_cannot_become_a_stop(text: str, stop: tuple[str, ...], cuts: list[int]) -> None:
    output = OutputText(stop)
    out, data = "", b""
    for piece in cut(text.encode(), cuts):
        out += output.push(piece)
        data += piece
        if output.stopped:
            return
        held = data.decode("utf-8", "ignore")[len(out) :]
        assert not held or any(s.startswith(held) for s in stop)


@given(texts, stops, cuts)
def test_the_index_names_the_token_that_holds_the_last_character(
    text: str, stop: tuple[str, ...], cuts: list[int]
) -> None:
    pieces = cut(text.encode(), cuts)
    output = OutputText(stop)
    out = ""
    for last in range(len(pieces)):
        out += output.push(pieces[last])
        ends = [len(b"".join(pieces[: n + 1]).decode("utf-8", "ignore")) for n in range(len(pieces))]
        assert output.index == (next(n for n, end in enumerate(ends) if end >= len(out)) if out else -1)
        if output.stopped:
            return
