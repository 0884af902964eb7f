"""An account where orchd never ran, a server to talk to, and what a command does to its process, undone."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from testkit import stand_in as s
from testkit.stand_in import StandIn


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """`orchd serve` sets up logging to a stderr that is the test's, and gone afterwards."""
    handlers, level = logging.root.handlers[:], logging.root.level
    levels = {name: logging.getLogger(name).level for name in ("orchd", "engines", "orchd.tasks")}
    yield
    logging.getLogger("orchd.tasks").handlers.clear()
    logging.getLogger("orchd.tasks").propagate = True
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    for name, was in levels.items():
        logging.getLogger(name).setLevel(was)


@pytest.fixture
def server() -> Iterator[StandIn]:
    with s.serving() as stand_in:
        yield stand_in


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An account where orchd never ran."""
    for name in [name for name in os.environ if name.startswith(("ORCHD_", "XDG_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.chdir(tmp_path)
    return tmp_path
