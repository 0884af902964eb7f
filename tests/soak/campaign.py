"""The count: ``python -m tests.soak.campaign --minutes 30`` runs every client behaviour, with reloads all along.

A warm-up, then two halves, and more where memory grew. After each the clients stop, everything ends, and the server's
threads, descriptors and memory are read; after a half it has forgotten every task. At the end every accepted task must
have had exactly one ``end``, and the server's own metrics must say what its clients saw.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from engines.llamacpp.vocab import LlamaVocab
from tests.soak.clients import BEARER, PATIENCE_S, Client
from tests.soak.ledger import Ledger, Samples
from tests.soak.server import (
    BROKEN_POOL,
    GIVE_BACK,
    GOOD,
    LONG_RETENTION_S,
    POOLS,
    RETENTION_S,
    Usage,
    served,
    write_models,
)

EXECUTOR_THREADS = 32
"""Most threads that asyncio makes for long prompts, as they are needed, and keeps."""

NOTHING_SLACK_KIB = 1024
"""Below this a growth is the allocator's, whatever share of a small process it is."""

MORE_LOOKS = 2
"""How often the second half is repeated where memory grew over it. What a hang of a worker or a reload leaves to the
allocator moves one look by up to 3 % either way; what leaks grows at its pace, and is as much too much after all."""


@dataclass
class Report:
    """What came of it."""

    ledger: Ledger
    seconds: float
    usages: list[Usage]
    faults: list[str]

    @property
    def growth_percent(self) -> float:
        """Of resident memory, since half time."""
        half, end = self.usages[1], self.usages[-1]
        return 100 * (end.resident_kib / half.resident_kib - 1)

    def lines(self) -> list[str]:
        ledger = self.ledger
        ends = sum(task.end is not None for task in ledger.tasks.values())
        counts = (ledger.reasons, ledger.refused, {str(status): n for status, n in ledger.reloads.items()})
        ended, refused, reloads = (", ".join(f"{name} {n}" for name, n in sorted(one.items())) for one in counts)
        threads, files, resident = (
            ", ".join(str(one) for one in figures)
            for figures in (
                [usage.threads for usage in self.usages],
                [usage.files for usage in self.usages],
                [round(usage.resident_kib / 1024, 1) for usage in self.usages],
            )
        )
        return [
            f"{self.seconds:.0f} s: {len(ledger.tasks)} tasks accepted, {ends} ends recorded ({ended})",
            f"{ledger.streams} streams with {ledger.events} events checked; refused: {refused or 'none'}",
            f"reloads by status: {reloads}",
            f"after warm-up, half, end: threads {threads}; descriptors {files}; "
            f"resident MiB {resident} ({self.growth_percent:+.2f} % since half time)",
            *(f"FAULT: {fault}" for fault in self.faults),
        ]


async def soak(home: Path, *, seconds: float, clients: int = 48, seed: int = 0) -> Report:
    """Run a server and the campaign against it."""
    bad = write_models(home)
    retention_s = RETENTION_S if seconds < 120 else LONG_RETENTION_S
    began = time.monotonic()
    with served(home, retention_s=retention_s) as (process, log):
        port = await asyncio.to_thread(process.wait_ready)
        campaign = _Campaign(port, process.popen.pid, Ledger(), bad, random.Random(seed), clients)
        usages = []
        await campaign.send_the_largest()
        for share, forget_s in ((0.2, 0.0), (0.4, retention_s), (0.4, retention_s)):
            await campaign.load(seconds * share)
            usages.append(await campaign.quiesce(forget_s))
            if len(usages) == 2:
                log.kill()  # whoever read the log leaves; the server writes on
        while _grew(*usages[1:]) and len(usages) < 3 + MORE_LOOKS:
            await campaign.load(seconds * 0.4)
            usages.append(await campaign.quiesce(retention_s))
        faults = campaign.ledger.faults + await campaign.verdict(home / f"{GOOD[0]}.gguf", usages)
        faults += _logged_faults((home / "log").read_text())
        process.send(signal.SIGTERM)
        if (code := await asyncio.to_thread(process.wait)) != 0:
            faults.append(f"the server left with {code} after SIGTERM")
    return Report(campaign.ledger, time.monotonic() - began, usages, faults)


@dataclass
class _Campaign:
    port: int
    pid: int
    ledger: Ledger
    bad: Sequence[str]
    chance: random.Random
    clients: int

    async def send_the_largest(self) -> None:
        """All clients at once, so that the memory this takes is there before any is weighed."""
        async with self._session() as session:
            clients = [Client(self.port, session, self.ledger, self.chance) for _ in range(self.clients)]
            await asyncio.gather(*(client.largest() for client in clients))

    async def load(self, seconds: float) -> None:
        """Clients and reloads for a while; returns when every client has finished its last task."""
        until = time.monotonic() + seconds
        async with self._session() as session:

            async def client(number: int) -> None:
                one = Client(self.port, session, self.ledger, random.Random(self.chance.getrandbits(64)))
                await asyncio.sleep(number / self.clients)
                while time.monotonic() < until:
                    await one.one_task()

            reloads = [asyncio.create_task(self._reload(session, pool)) for pool in POOLS]
            reloads.append(asyncio.create_task(self._reload_broken(session)))
            await asyncio.gather(*(client(number) for number in range(self.clients)))
            for reload in reloads:
                reload.cancel()
            await asyncio.gather(*reloads, return_exceptions=True)

    @contextlib.asynccontextmanager
    async def _session(self) -> Any:
        timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
            yield session

    async def _reload(self, session: aiohttp.ClientSession, pool: str) -> None:
        """Good and bad by turns; a second one at the same time now and then."""
        while True:
            await asyncio.sleep(self.chance.uniform(0.2, 2))
            asked = self.chance.choice([*GOOD, *GOOD, *self.bad, "nowhere", "../secret"])
            twice = [asked, self.chance.choice(GOOD)] if self.chance.random() < 0.2 else [asked]
            for status in await asyncio.gather(*(self.ask_reload(session, pool, name) for name in twice)):
                self.ledger.reloads[status] += 1

    async def _reload_broken(self, session: aiohttp.ClientSession) -> None:
        """The pool that never came up is asked to load what cannot be loaded either."""
        while True:
            await asyncio.sleep(self.chance.uniform(1, 5))
            status = await self.ask_reload(session, BROKEN_POOL, self.chance.choice(self.bad))
            self.ledger.reloads[status] += 1

    async def ask_reload(self, session: aiohttp.ClientSession, pool: str, name: str) -> int:
        url = f"http://127.0.0.1:{self.port}/v1/pools/{pool}/reload"
        async with session.post(url, json={"new_model_ref": name}, headers=BEARER) as response:
            await response.read()
            bad = name in self.bad
            wanted = {422, 409} if bad else {200, 409} if name in GOOD else {400, 409}
            if response.status not in wanted:
                self.ledger.complain(f"a reload to {name} was answered with {response.status}")
            return response.status

    async def quiesce(self, forget_s: float) -> Usage:
        """What the server holds when nothing runs, with the same model everywhere, and after a while of nothing."""
        async with self._session() as session:
            for pool in POOLS:
                for _ in range(100):
                    if await self.ask_reload(session, pool, GOOD[0]) == 200:
                        break
                    await asyncio.sleep(0.2)  # one whose client left is still under way
            for _ in range(100):
                async with session.get(f"http://127.0.0.1:{self.port}/health", headers=BEARER) as response:
                    pools = (await response.json())["pools"]
                busy = sum(replica["busy"] for pool in pools for replica in pool["replicas"])
                if not busy:
                    break
                await asyncio.sleep(0.1)
            else:
                self.ledger.complain(f"{busy} slots are held though every client has left")
        await asyncio.sleep(forget_s + 0.5)
        os.kill(self.pid, GIVE_BACK)
        await self._health_to_the_end()  # answered by the thread that has given it back before
        return Usage.of(self.pid)

    async def _health_to_the_end(self) -> None:
        """Ask on a connection of its own, and wait until the server has closed it: its descriptor is not to count."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = {"Host": "localhost", "Connection": "close", **BEARER}
        lines = ["GET /health HTTP/1.1", *(f"{name}: {value}" for name, value in head.items()), "", ""]
        writer.write("\r\n".join(lines).encode())
        await reader.read()
        writer.close()

    async def verdict(self, model: Path, usages: Sequence[Usage]) -> list[str]:
        """Every end condition that does not hold."""
        ledger = self.ledger
        wrong = [f"{task_id} has no end" for task_id, task in ledger.tasks.items() if task.end is None]
        wrong += ledger.check_metrics(await self._metrics(), self._prompt_tokens(model))
        start, end = usages[0], usages[-1]
        if end.threads > start.threads + EXECUTOR_THREADS or end.files > start.files:
            wrong.append(f"threads or descriptors grew: {usages}")
        if _grew(*usages[1:]):
            wrong.append(f"memory grew by more than 2 % for each half after the first: {usages}")
        return wrong

    async def _metrics(self) -> Samples:
        async with (
            self._session() as session,
            session.get(f"http://127.0.0.1:{self.port}/metrics", headers=BEARER) as response,
        ):
            families = text_string_to_metric_families(await response.text())
            return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}

    def _prompt_tokens(self, model: Path) -> int:
        """Of every task that started; both models tokenise alike."""
        vocab = LlamaVocab(model)
        try:
            return sum(
                len(
                    vocab.tokenize_chat(task.request["messages"]).tokens
                    if "messages" in task.request
                    else vocab.tokenize(task.request["prompt"])
                )
                for task in self.ledger.tasks.values()
                if task.started
            )
        finally:
            vocab.close()


def _grew(half: Usage, *later: Usage) -> bool:
    """Whether a server has gained more since half time than it may for each share of the load since then."""
    most_kib = max(0.02 * half.resident_kib * len(later), NOTHING_SLACK_KIB)
    return later[-1].resident_kib - half.resident_kib > most_kib


_WANTED = ("hangs in a step", f'pool "{BROKEN_POOL}"')
"""Errors that the campaign makes on purpose."""


def _logged_faults(log: str) -> list[str]:
    """Errors and tracebacks, from the first one on."""
    lines = [line for line in log.splitlines() if not any(wanted in line for wanted in _WANTED)]
    first = next((i for i, line in enumerate(lines) if "Traceback" in line or " ERROR " in line), len(lines))
    return lines[first : first + 60]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak.campaign", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0, help="how long clients come, all in all")
    parser.add_argument("--clients", type=int, default=48)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        report = asyncio.run(soak(Path(home), seconds=60 * options.minutes, clients=options.clients, seed=options.seed))
    print(f"seed {options.seed}", *report.lines(), sep="\n")
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
