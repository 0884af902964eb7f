"""How long a value is, written out: as one would count it, and no slower where much of it is there twice."""

from __future__ import annotations

import jinja2.utils
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.llamacpp import template_sizes
from engines.llamacpp.template_sizes import ITEM_CHARS, MAX_CHARS, depth, size

values = st.recursive(
    st.one_of(st.text(max_size=5), st.integers(), st.none(), st.floats(), st.booleans(), st.builds(range, st.just(3))),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=3), inner, max_size=3),
        st.dictionaries(st.sampled_from("abc"), inner, max_size=2).map(lambda names: jinja2.utils.Namespace(**names)),
        inner.map(lambda one: [one, one]),
    ),
    max_leaves=30,
)


def counted(value: object) -> int:
    if isinstance(value, jinja2.utils.Namespace):
        value = object.__getattribute__(value, "_Namespace__attrs")
    if isinstance(value, str):
        return len(value)
    if isinstance(value, int):
        return value.bit_length()
    if isinstance(value, dict):
        return ITEM_CHARS * len(value) + sum(map(counted, value)) + sum(map(counted, value.values()))
    if isinstance(value, (list, tuple, range)):
        return ITEM_CHARS * len(value) + sum(map(counted, value))
    return 1


@given(values)
def test_a_size_is_what_one_counts(value: object) -> None:
    assert size(value) == counted(value)


@given(values)
def test_in_a_list_it_is_deeper_by_one(value: object) -> None:
    assert depth([value]) == depth(value) + 1


def nested(levels: int, width: int = 2) -> object:
    value: object = "x"
    for _ in range(levels):
        value = [value] * width
    return value


def test_what_is_there_twice_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0
    looked_at = template_sizes._looked_at

    def look(*given: object) -> object:
        nonlocal looks
        looks += 1
        return looked_at(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(template_sizes, "_looked_at", look)
    assert size(nested(15)) == ITEM_CHARS * (2**16 - 2) + 2**15
    assert looks <= 16
    assert size(nested(1000)) > MAX_CHARS
    assert looks <= 40


def test_counting_stops_where_it_is_too_much() -> None:
    assert size(nested(3, width=300)) > MAX_CHARS
    assert size(range(10**18)) > MAX_CHARS
    assert size(["x" * MAX_CHARS, range(10**9)]) > MAX_CHARS
