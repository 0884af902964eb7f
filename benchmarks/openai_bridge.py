"""What `orchd openai` adds: to the time to the first token, and in processor time for each token.

    python -m benchmarks.openai_bridge [MODEL.gguf]

Requests alternate between the server and the bridge before it, one at a time; then 64 streams at once pass through the
bridge, and none may be lost. Without a model it is the tiny one, whose steps take no time to speak of.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp

from benchmarks.serving import TOKEN, client, cpu_s, serving
from testkit.tiny_gguf import write_tiny_llama

STREAMS = 64
PROMPT = "hello world"


@contextmanager
def bridge(server_url: str) -> Iterator[tuple[str, int]]:
    """A bridge's URL and process id."""
    command = [sys.executable, "-m", "orchd", "openai", "--port", "0", "--url", server_url]
    with subprocess.Popen(
        command, env={**os.environ, "ORCHD_TOKEN": TOKEN}, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"at (http://\S+)/v1", process.stdout.readline())
            assert found, "the bridge does not come up"
            yield found[1], process.pid
        finally:
            process.terminate()


async def direct_ms(session: aiohttp.ClientSession) -> float:
    """Time to the first token from the server itself."""
    began = time.perf_counter()
    async with session.post("/v1/tasks", json={"prompt": PROMPT, "max_tokens": 2, "ignore_eos": True}) as response:
        task_id = (await response.json())["task_id"]
    took_ms = 0.0
    async with session.get(f"/v1/tasks/{task_id}/stream") as response:
        async for line in response.content:
            if line == b"event: token\n" and not took_ms:
                took_ms = (time.perf_counter() - began) * 1000
    return took_ms


async def bridged(session: aiohttp.ClientSession, max_tokens: int) -> AsyncIterator[dict[str, object]]:
    """A streamed completion's chunks."""
    wanted = {"model": "default", "prompt": PROMPT, "max_tokens": max_tokens, "stream": True, "temperature": 0}
    async with session.post("/v1/completions", json=wanted | {"stream_options": {"include_usage": True}}) as response:
        assert response.status == 200, await response.text()
        ended = False
        async for line in response.content:
            if line == b"data: [DONE]\n":
                ended = True
            elif line.startswith(b"data: "):
                yield json.loads(line[6:])
        assert ended, "a stream was lost"


async def bridged_ms(session: aiohttp.ClientSession) -> float:
    """Time to the first token through the bridge."""
    began = time.perf_counter()
    took_ms = 0.0
    async for _ in bridged(session, 2):
        took_ms = took_ms or (time.perf_counter() - began) * 1000
    return took_ms


async def whole(session: aiohttp.ClientSession, max_tokens: int) -> int:
    """Output tokens of a stream, as its usage says at its end."""
    tokens = 0
    async for chunk in bridged(session, max_tokens):
        if isinstance(usage := chunk.get("usage"), dict):
            tokens = usage["completion_tokens"]
    assert tokens, "a stream told no usage"
    return tokens


async def measure(server: tuple[str, int], over: tuple[str, int], *, pairs: int, rounds: int, max_tokens: int) -> None:
    async with client(server[0]) as direct, client(over[0]) as through:
        for _ in range(10):
            await direct_ms(direct)
            await bridged_ms(through)
        both = [(await direct_ms(direct), await bridged_ms(through)) for _ in range(pairs)]
        added = [there - here for here, there in both]
        here_ms, there_ms = (statistics.median(one) for one in zip(*both, strict=True))
        print(f"TTFT, median of {pairs}: server {here_ms:.2f} ms, bridge {there_ms:.2f} ms")
        print(f"added: median {statistics.median(added):.2f} ms (limit 3), 95th centile {_centile(added, 95):.2f} ms")

        before = cpu_s(server[1]), cpu_s(over[1])
        tokens = 0
        began = time.perf_counter()
        for _ in range(rounds):
            tokens += sum(await asyncio.gather(*(whole(through, max_tokens) for _ in range(STREAMS))))
        took_s = time.perf_counter() - began
        server_us, bridge_us = (
            (cpu_s(pid) - was) / tokens * 1e6 for pid, was in zip((server[1], over[1]), before, strict=True)
        )
        print(f"{rounds * STREAMS} streams, {STREAMS} at once: {tokens / took_s:.0f} tokens/s, none lost")
        print(f"CPU per token: server {server_us:.0f} µs, bridge {bridge_us:.0f} µs")


def _centile(values: list[float], centile: int) -> float:
    return statistics.quantiles(values, n=100)[centile - 1]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("model", nargs="?", type=Path)
    options.add_argument("--pairs", type=int, default=200)
    options.add_argument("--rounds", type=int, default=4)
    options.add_argument("--max-tokens", type=int, default=128)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = given.model or write_tiny_llama(Path(folder) / "tiny.gguf")
        with serving(model, slots=STREAMS, ctx=512, capacity=STREAMS) as server, bridge(server[0]) as over:
            wanted = {"pairs": given.pairs, "rounds": given.rounds, "max_tokens": given.max_tokens}
            asyncio.run(measure(server, over, **wanted))


if __name__ == "__main__":
    main()
