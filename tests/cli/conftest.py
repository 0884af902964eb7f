"""What a command does to its process, undone."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """`orchd serve` sets up logging to a stderr that is the test's, and gone afterwards."""
    handlers, level = logging.root.handlers[:], logging.root.level
    levels = {name: logging.getLogger(name).level for name in ("orchd", "engines")}
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    for name, was in levels.items():
        logging.getLogger(name).setLevel(was)
