"""What every refusal looks like, and that it took no place."""

from __future__ import annotations

from testkit.harness import Answer, Running


def assert_envelope(answer: Answer, status: int, code: str) -> str:
    """Check an error's status and shape; returns its message."""
    assert answer.status == status, answer.body
    assert answer.headers["Content-Type"] == "application/json"
    body = answer.json()
    assert set(body) == {"code", "message", "engine"}
    assert (body["code"], body["engine"]) == (code, "llamacpp")
    message = str(body["message"])
    assert message
    assert "\n" not in message
    assert len(message) <= 500
    return message


async def places(server: Running) -> dict[str, float]:
    """Everything that a task in the queue or on a slot would change."""
    samples = await server.metrics()
    counted = ("queue_depth", "tasks_enqueued_total", "tokens_in_total", "tokens_out_total")
    return {f"{name}{sorted(labels)}": v for (name, labels), v in samples.items() if name in counted}
