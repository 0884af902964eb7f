"""Python's garbage collector in a process that starts quickly and lives long."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from orchd.garbage import AT_START, expect_garbage, expect_imports


@pytest.fixture(autouse=True)
def _unfrozen() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_a_start_is_not_held_up_and_what_comes_after_it_is_collected_as_usual() -> None:
    usual = gc.get_threshold()
    expect_imports()
    assert gc.get_threshold()[0] == AT_START > usual[0]
    expect_garbage()
    assert gc.get_threshold() == usual
    assert gc.get_freeze_count() > 0
