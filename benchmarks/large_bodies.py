"""How long others wait beside submits that are as large as a server takes, and of every shape that has been costly.

    python -m benchmarks.large_bodies [MODEL.gguf] [--at-once N] [--rounds N] [--only TEXT]

A server runs one stream. Another process sends the same body N times at once, and until all are answered ``/health`` is
asked again and again. For each shape: the longest answer of ``/health`` and the longest gap between two tokens of the
stream, medians of the rounds and, in parentheses, the longest of all; and how long all N took. The first line is
without bodies, for two seconds. Without a model it is the demo model.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import multiprocessing
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from benchmarks.steps import table
from orchd.models.references import demo_model_path
from testkit.large_bodies import SHAPES
from testkit.process import TOKEN, follow, orchd_serve, submit

HEADERS = {"Authorization": f"Bearer {TOKEN}"}
CONFIG = """
[tasks]
cancel_grace_s = 0.2  # so that a body that was accepted does not wait in the queue for long

[[pools]]
id = "default"
model = "{model}"
"""
QUIET_S = 2.0


class Round(NamedTuple):
    """What others saw, in milliseconds."""

    health_ms: float
    gap_ms: float
    took_ms: float


class Stream(threading.Thread):
    """Follows one task after another, and notes the gaps between their tokens."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self._port = port
        self.gaps_ms: list[float] = []

    def run(self) -> None:
        """Until the server ends."""
        with contextlib.suppress(ConnectionError):
            while True:
                self._follow(submit(self._port, prompt="Once upon a time", max_tokens=1000, ignore_eos=True))

    def _follow(self, task_id: str) -> None:
        last = None
        for kind, _ in follow(self._port, task_id):
            now = time.perf_counter()
            if last is not None and kind == "token":
                self.gaps_ms.append((now - last) * 1e3)
            last = now if kind == "token" else None


def _send(port: int, body: bytes) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/v1/tasks", body, HEADERS)
    return connection.getresponse().status


def send(port: int, shape: str, at_once: int) -> list[int]:
    """The statuses of so many equal bodies."""
    with ThreadPoolExecutor(at_once) as threads:
        return list(threads.map(_send, [port] * at_once, [SHAPES[shape]] * at_once))


def watched(port: int, stream: Stream, until: Callable[[], bool]) -> Round:
    """Ask ``/health`` again and again, until then and until a token has come."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    seen, began, took_s, longest_s = len(stream.gaps_ms), time.perf_counter(), None, 0.0
    while took_s is None or len(stream.gaps_ms) == seen:
        asked = time.perf_counter()
        connection.request("GET", "/health", headers=HEADERS)
        connection.getresponse().read()
        longest_s = max(longest_s, time.perf_counter() - asked)
        time.sleep(0.001)
        if took_s is None and until():
            took_s = time.perf_counter() - began
    return Round(longest_s * 1e3, max(stream.gaps_ms[seen:]), took_s * 1e3)


def line(name: str, rounds: Sequence[Round]) -> list[str]:
    """A row of the table."""
    cells = [f"{statistics.median(side):.0f} ({max(side):.0f})" for side in zip(*(r[:2] for r in rounds), strict=True)]
    return [name, *cells, f"{statistics.median(r.took_ms for r in rounds):.0f}"]


def measure(port: int, shapes: Sequence[str], *, at_once: int, rounds: int) -> list[list[str]]:
    """A row for each shape, and one without any."""
    stream = Stream(port)
    stream.start()
    deadline = time.perf_counter() + QUIET_S
    watched(port, stream, lambda: time.perf_counter() > deadline)  # warm-up
    lines = []
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as sender:
        sender.submit(len, "").result()
        deadline = time.perf_counter() + QUIET_S
        lines.append(line("none", [watched(port, stream, lambda: time.perf_counter() > deadline)]))
        for shape in shapes:
            seen = []
            for _ in range(rounds):
                answers = sender.submit(send, port, shape, at_once)
                seen.append(watched(port, stream, answers.done))
                answers.result()
                time.sleep(0.3)
            lines.append(line(shape, seen))
    return lines


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.large_bodies", description=__doc__)
    parser.add_argument("model", type=Path, nargs="?", default=demo_model_path(), metavar="MODEL.gguf")
    parser.add_argument("--at-once", type=int, default=10, metavar="N")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--only", default="", metavar="TEXT", help="shapes with this in their name")
    options = parser.parse_args()
    if options.model is None:
        parser.error("the demo model is not installed; run 'make setup', or give a model")
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "orchd.toml")
        config.write_text(CONFIG.format(model=options.model.resolve()))
        with orchd_serve("--config", str(config), "--port", "0", home=Path(folder)) as process:
            port = process.wait_ready()
            shapes = [shape for shape in SHAPES if options.only in shape]
            lines = measure(port, shapes, at_once=options.at_once, rounds=options.rounds)
    head = ("shape", "/health, ms", "gap between tokens, ms", f"{options.at_once} answered after, ms")
    table(f"{options.at_once} bodies at once, {options.rounds} rounds:", head, lines)


if __name__ == "__main__":
    main()
