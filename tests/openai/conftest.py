"""A stand-in for the server, and a bridge to it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from testkit import stand_in as s
from testkit.bridge import Bridge, bridging
from testkit.stand_in import TOKEN, StandIn


@pytest.fixture
def server() -> Iterator[StandIn]:
    with s.serving() as stand_in:
        stand_in.on("GET /health", s.answer(s.health_body()))
        yield stand_in


@pytest.fixture
async def bridge(server: StandIn) -> AsyncIterator[Bridge]:
    async with bridging(server.url, TOKEN) as bridge:
        yield bridge
