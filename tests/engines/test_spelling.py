"""Where a text spells others, however long it is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.llamacpp import spelling
from engines.llamacpp.spelling import Spellings


@given(
    texts=st.lists(st.text("<|ab", max_size=4), max_size=5),
    text=st.text("<|ab", max_size=60),
    at_once=st.integers(1, 20),
)
def test_every_spelling_is_found_wherever_the_search_pauses(texts: list[str], text: str, at_once: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spelling, "AT_ONCE", at_once)
        found = list(Spellings(texts).within(text))
        longest = list(Spellings(texts).longest(text))
    long = {one for one in texts if len(one) > 1}
    places = sorted(
        (start, start + len(one)) for one in long for start in range(len(text)) if text.startswith(one, start)
    )
    assert found == places
    assert longest == sorted(dict(places).items())


def test_a_spelling_across_two_parts_of_a_long_text_is_found() -> None:
    text = "a" * (spelling.AT_ONCE - 1) + "<|im_end|>"
    assert list(Spellings(["<|im_end|>"]).within(text)) == [(spelling.AT_ONCE - 1, len(text))]
