"""A server that answers as scripted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from testkit import stand_in
from testkit.stand_in import StandIn


@pytest.fixture
def server() -> Iterator[StandIn]:
    with stand_in.serving() as found:
        yield found
