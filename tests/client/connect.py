"""A client of that server."""

from __future__ import annotations

from typing import Any

from orchd.client import Client
from testkit.stand_in import TOKEN, StandIn


def connect(server: StandIn, *, token: str = TOKEN) -> Client:
    return Client(server.url, token=token)


async def texts(client: Client, **options: Any) -> str:
    return "".join([text async for text in client.run("hi", **options)])
