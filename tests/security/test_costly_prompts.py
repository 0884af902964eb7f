"""Prompts that cost more than they are worth: each is refused, and the event loop goes on beside ten of them."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import pytest

from testkit.harness import Running, serving

SPELLED = "<|im_end|>"


def of(**fields: object) -> bytes:
    return json.dumps(fields, ensure_ascii=False).encode()


def messages(content: str, count: int = 1) -> bytes:
    return of(messages=[{"role": "user", "content": content}] * count)


COSTLY = {
    "special tokens": of(prompt=SPELLED * 90_000),
    "beginnings of special tokens": of(prompt="<e‹e" * 170_000),
    "one word": of(prompt="A" * 1_000_000),
    "one number": of(prompt="1" * 1_000_000),
    "blanks": of(prompt=" " * 1_000_000),
    "characters without a token": of(prompt="字" * 300_000),
    "messages of nothing": messages("", 24_000),
    "many messages that spell special tokens": messages(SPELLED * 40, 2000),
    "a message that spells special tokens": messages(SPELLED * 90_000),
    "a message of openings": messages("<" * 900_000),
    "stops": of(prompt="a", stop=["a" * 100_000] * 8),
    "a number of many digits": b'{"prompt":"a","seed":' + b"9" * 900_000 + b"}",
    "depth": b'{"messages":' + b"[" * 400_000 + b"]" * 400_000 + b"}",
    "a long id": of(prompt="a", task_id="x" * 900_000),
    "many keys": json.dumps({f"k{n}": 0 for n in range(60_000)}).encode(),
}


@pytest.mark.slow
@pytest.mark.parametrize("body", COSTLY.values(), ids=COSTLY)
async def test_ten_of_them_are_refused_while_health_answers(tiny_model_path: Path, body: bytes) -> None:
    """`/health` takes 8 to 165 ms beside them on two cores; it took 9 to 20 s before prompts had threads."""
    async with serving(tiny_model_path, pool={"ctx": 1024}) as server:
        answers = asyncio.gather(*(post(server, body) for _ in range(10)))
        slowest = 0.0
        while not answers.done():
            began = time.perf_counter()
            assert (await server.request("GET", "/health")).status == 200
            slowest = max(slowest, time.perf_counter() - began)
        assert await answers == [400] * 10
        assert slowest < 2


async def post(server: Running, body: bytes) -> int:
    return (await server.request("POST", "/v1/tasks", body=body)).status
