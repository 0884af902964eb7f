"""One server process, from its start to its exit, and what the kernel says about it.

Guarantee: when `serving` has been left, the process and whatever it started have exited. Two servers never live at the
same time: the threads of an idle one may spin.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import aiohttp

from benchmarks.compare.drivers import Driver, Setup, Task

START_S: Final = 120.0
STOP_S: Final = 20.0
_LOG_TAIL: Final = 2000


@dataclass(frozen=True)
class Running:
    """A server that is ready."""

    driver: Driver
    setup: Setup
    pid: int
    session: aiohttp.ClientSession

    def stream(self, task: Task) -> contextlib.AbstractAsyncContextManager[aiohttp.ClientResponse]:
        """Send a task; the response that streams its output."""
        stream: contextlib.AbstractAsyncContextManager[aiohttp.ClientResponse] = self.driver.stream(self.session, task)
        return stream

    def rss_bytes(self) -> int:
        """Resident memory of the process and its children, pages that they share counted once each."""
        return sum(_rss_bytes(pid) for pid in [self.pid, *_children(self.pid)])

    def cpu_s(self) -> float:
        """CPU time of all its threads so far, in user space and kernel."""
        return sum(_cpu_s(f"/proc/{self.pid}/task/{thread}") for thread in os.listdir(f"/proc/{self.pid}/task"))

    def main_thread_cpu_s(self) -> float:
        """CPU time of its main thread: in orchd that is the event loop."""
        return _cpu_s(f"/proc/{self.pid}/task/{self.pid}")


@contextlib.asynccontextmanager
async def serving(driver: Driver, setup: Setup) -> AsyncIterator[Running]:
    """Start a server, wait until it is ready, and see it gone at the end.

    Raises:
        RuntimeError: It ended or was not ready in time; with the end of its log.
    """
    with tempfile.TemporaryDirectory(prefix="orchd-bench-") as folder:
        port, log = _free_port(), Path(folder, "log")
        process = await _start(driver, driver.command(setup, Path(folder), port), log)
        try:
            url = await _ready(driver, process, log, port)
            async with aiohttp.ClientSession(
                url,
                headers=driver.headers,
                connector=aiohttp.TCPConnector(limit=0, force_close=not driver.keeps_connections),
                timeout=aiohttp.ClientTimeout(total=None),
            ) as session:
                yield Running(driver, setup, process.pid, session)
            if process.returncode is not None:
                raise RuntimeError(f"{driver.name} ended by itself: {_tail(log)}")
        finally:
            await _stop(process)


async def _start(driver: Driver, command: list[str], log: Path) -> asyncio.subprocess.Process:
    with log.open("wb") as file:
        return await asyncio.create_subprocess_exec(
            *command,
            stdout=file,
            stderr=file,
            cwd=log.parent,
            env={**os.environ, **driver.environment()},
            start_new_session=True,
        )


async def _ready(driver: Driver, process: asyncio.subprocess.Process, log: Path, port: int) -> str:
    deadline = asyncio.get_running_loop().time() + START_S
    async with aiohttp.ClientSession(headers=driver.headers) as session:
        while asyncio.get_running_loop().time() < deadline:
            if process.returncode is not None:
                raise RuntimeError(f"{driver.name} ended with {process.returncode}: {_tail(log)}")
            url = driver.url(_read(log), port)
            if url is not None:
                with contextlib.suppress(aiohttp.ClientConnectionError):
                    async with session.get(url + driver.health) as answer:
                        if answer.status == 200:
                            return url
            await asyncio.sleep(0.05)
    raise RuntimeError(f"{driver.name} was not ready within {START_S:.0f} s: {_tail(log)}")


async def _stop(process: asyncio.subprocess.Process) -> None:
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(process.wait(), STOP_S)
            return


def _tail(log: Path) -> str:
    return _read(log)[-_LOG_TAIL:]


def _read(log: Path) -> str:
    return log.read_text(errors="replace")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def _children(pid: int) -> list[int]:
    direct = [
        int(child)
        for thread in os.listdir(f"/proc/{pid}/task")
        for child in Path(f"/proc/{pid}/task/{thread}/children").read_text().split()
    ]
    return direct + [grandchild for child in direct for grandchild in _children(child)]


def _rss_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def _cpu_s(folder: str) -> float:
    """The scheduler's own nanoseconds where the kernel keeps them, else its clock ticks of 10 ms."""
    try:
        return int(Path(folder, "schedstat").read_text().split()[0]) / 1e9
    except FileNotFoundError:
        user, system = Path(folder, "stat").read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
