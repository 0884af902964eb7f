"""What a stand-in for the server writes."""

from __future__ import annotations

from typing import Any

from testkit import stand_in as s
from testkit.stand_in import StandIn


def writing(server: StandIn, *pieces: str, reason: str = "stop", thought: tuple[str, ...] = (), **end: Any) -> None:
    """The server accepts a task and writes these pieces, after what it thinks."""
    server.on("POST /v1/tasks", s.accept())
    reasoning = [s.event(n, "token", {"r": piece, "i": n - 1}) for n, piece in enumerate(thought, 1)]
    tokens = [s.token(n, piece) for n, piece in enumerate(pieces, 1 + len(thought))]
    figures = {"tokens_in": 7, "tokens_cached": 3} | end
    last = s.end(1 + len(thought) + len(pieces), reason, **figures)
    server.on("GET stream", s.stream(s.started(), *reasoning, *tokens, last))


def task(server: StandIn) -> dict[str, Any]:
    """The only task that was submitted."""
    [seen] = server.requests("POST /v1/tasks")
    body: dict[str, Any] = seen.body
    return body
