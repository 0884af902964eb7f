"""Our own parsers under made-up input; for longer under Atheris: ``python -m tests.security.fuzz NAME``."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.llamacpp.text import OutputText
from tests.security.fuzz import TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_any_bytes_keep_a_parsers_promises(name: str) -> None:
    @settings(max_examples=150, deadline=None, database=None)
    @given(st.binary(max_size=300))
    def run(data: bytes) -> None:
        TARGETS[name](data)

    run()


@pytest.mark.parametrize("stop", ["a" * 256, "ab" * 128, "a" * 255 + "b", "aab" * 85])
def test_no_stop_string_makes_reading_slow(stop: str) -> None:
    """Matching is linear whatever the stop looks like: a text made of its beginnings costs what any other costs."""

    def seconds(stops: tuple[str, ...], text: bytes) -> float:
        output = OutputText(stops)
        began = time.thread_time()
        for _ in range(2000):
            output.push(text)
        return time.thread_time() - began

    hostile = (stop[:-1] + "z").encode()[-32:]
    harmless = seconds(("#",) * 8, hostile)
    assert seconds((stop,) * 8, hostile) < 20 * harmless + 0.5
