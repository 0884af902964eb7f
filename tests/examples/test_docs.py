"""What the pages of the documentation include is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from testkit.account import ROOT

PAGES = sorted((ROOT / "docs").rglob("*.md"))
LIKE_A_MARK = re.compile(r"^.*8 *< *-.*$", re.MULTILINE)
MARK = re.compile(r'^ *--8<-- "(?P<file>[^:"]+):(?P<line>\d+):"$')


def marks(page: Path) -> list[str]:
    return LIKE_A_MARK.findall(page.read_text())


def test_some_pages_include_examples() -> None:
    assert sum(len(marks(page)) for page in PAGES) >= 5


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_included_files_are_there_from_the_line_that_is_named(page: Path) -> None:
    for mark in marks(page):
        found = MARK.match(mark)
        assert found, f"{page.name}: {mark}"
        lines = (ROOT / found["file"]).read_text().splitlines()
        first = int(found["line"])
        assert lines[first - 1].strip(), f"{found['file']}:{first} is an empty line"
        before = lines[first - 2].strip()
        assert not before or before.startswith(("#", "//")), f"{found['file']}:{first} is in the middle"
