"""Scenarios in which prompts come back, or meet other work: conversations, an agent, short beside long."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from benchmarks.compare import load
from benchmarks.compare.stats import Metrics, Sample, latencies, percentile, within

if TYPE_CHECKING:
    from benchmarks.compare.servers import Running
    from benchmarks.compare.workloads import Work

MIB: Final = 1 << 20


async def conversations(server: Running, work: Work, *, count: int) -> Metrics:
    """So many conversations of 400 tokens take turns: 15 more tokens, 8 asked for. The first turn is not counted."""
    texts = [work.text(400) for _ in range(count)]
    later: list[Sample] = []
    for turn in range(2 if work.quick else 4):
        for number in range(count):
            texts[number] += work.text(15)
            samples = await load.closed_loop(server, [[work.task(0, 8, prefix=texts[number])]])
            later += samples if turn else []
    figures = latencies(later)
    return {name: figures[name] for name in ("ttft_p50_ms", "ttft_p99_ms")} | {"rss_mib": server.rss_bytes() / MIB}


async def agent(server: Running, work: Work) -> Metrics:
    """One client's prompt grows from 500 to 6,000 tokens in 24 turns, while two others stream."""
    turns = 6 if work.quick else 24
    text, samples = work.text(500), []
    async with load.background(server, lambda: work.task(32, 4096), clients=2, settle_tokens=16) as streams:
        start_s = load.clock()
        for _ in range(turns):
            samples += await load.closed_loop(server, [[work.task(0, 16, prefix=text)]])
            text += work.text(5500 // 24)
        end_s = load.clock()
    running = [part for one in streams() if len((part := within(one, start_s, end_s)).token_s) > 1]
    ttft = latencies(samples)
    return {
        "tokens_per_s": (sum(part.tokens for part in running) + 16 * turns) / (end_s - start_s),
        **{name: ttft[name] for name in ("ttft_p50_ms", "ttft_p99_ms")},
        "itl_max_ms": latencies(running)["itl_max_ms"],
        "rss_mib": server.rss_bytes() / MIB,
    }


async def short_behind_long(server: Running, work: Work) -> Metrics:
    """A prompt of 16 tokens comes 0.3 s after one of 5,000; nothing else runs. TTFT of both."""
    short_s, long_s = [], []

    async def after(delay_s: float, tokens: int) -> float:
        await asyncio.sleep(delay_s)
        (sample,) = await load.closed_loop(server, [[work.task(tokens, 16)]])
        return sample.ttft_s

    for _ in range(1 if work.quick else 3):
        long, short = await asyncio.gather(after(0, 5000), after(0.3, 16))
        short_s.append(short)
        long_s.append(long)
    return {"ttft_p50_ms": percentile(short_s, 50) * 1e3, "long_ttft_p50_ms": percentile(long_s, 50) * 1e3}


async def interactive_beside_batch(server: Running, work: Work) -> Metrics:
    """A prompt of 1,000 tokens, beside three streams for which nobody waits (`batch`, where a server knows that)."""
    samples = []
    async with load.background(server, lambda: work.batch_task(32, 4096), clients=3, settle_tokens=16):
        for _ in range(2 if work.quick else 5):
            samples += await load.closed_loop(server, [[work.task(1000, 16)]])
    return {"ttft_p50_ms": percentile([sample.ttft_s for sample in samples], 50) * 1e3}
