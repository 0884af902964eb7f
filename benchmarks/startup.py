"""How long each command takes to start, beside `python -c pass`, and `orchd serve` until it is ready.

    python -m benchmarks.startup                      # medians of 9 rounds
    python -m benchmarks.startup --model FILE --server build/peer/bin/llama-server

The rounds are interleaved: one of each command, then all again. A server answers `orchd health`; `serve` runs in an
account of its own, once before it is measured and then as at every later start; `serve, first` forgets before each
round what it has vetted. Both end with the first 200 of ``GET /health``.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from orchd.models.references import demo_model_path
from testkit.process import TOKEN, free_port

ROOT = Path(__file__).parents[1]
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "orchd health": ["-m", "orchd", "health"],
    "orchd --version": ["-m", "orchd", "--version"],
    "orchd run --help": ["-m", "orchd", "run", "--help"],
    "orchd serve --help": ["-m", "orchd", "serve", "--help"],
    "orchd reload --help": ["-m", "orchd", "reload", "--help"],
    "orchd check --help": ["-m", "orchd", "check", "--help"],
}
LIMIT_S = 120.0


def environment(home: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ORCHD_", "XDG_"))}
    return kept | {"HOME": str(home), "ORCHD_TOKEN": TOKEN, "PYTHONPATH": str(ROOT)}


def command_s(arguments: list[str], home: Path) -> float:
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, *arguments], env=environment(home), capture_output=True, timeout=LIMIT_S, check=True
    )
    return time.perf_counter() - began


@contextlib.contextmanager
def serving(command: list[str], port: int, home: Path) -> Iterator[float]:
    """A server until the context ends; seconds from its start to its first 200."""
    began = time.perf_counter()
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, env=environment(home), cwd=home, stdin=quiet, stdout=quiet, stderr=quiet)
    try:
        while not is_ready(port):
            if process.poll() is not None or time.perf_counter() - began > LIMIT_S:
                raise RuntimeError(f"{' '.join(command)} does not get ready")
            time.sleep(0.002)
        yield time.perf_counter() - began
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health", headers={"Authorization": f"Bearer {TOKEN}"})
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def orchd_serve(model: Path, port: int) -> list[str]:
    return [sys.executable, "-m", "orchd", "serve", "--model", str(model), "--device", "cpu", "--port", str(port)]


def llama_server(program: Path, model: Path, port: int) -> list[str]:
    """With the same slots and context as `orchd serve` has by default."""
    return [str(program), "-m", str(model), "--port", str(port), "-np", "4", "-c", str(4 * 4096)]


def start_s(command: list[str], port: int, home: Path) -> float:
    with serving(command, port, home) as seconds:
        return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, metavar="N")
    parser.add_argument(
        "--model", type=Path, default=demo_model_path(), metavar="FILE", help="(default: the demo model)"
    )
    parser.add_argument("--server", type=Path, metavar="FILE", help="a llama-server to compare `orchd serve` with")
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        home, port, other = Path(folder), free_port(), free_port()
        serve = orchd_serve(options.model, other)
        start_s(serve, other, home)  # the model is in the page cache now
        with serving(orchd_serve(options.model, port), port, home):
            for _ in range(options.rounds):
                for name, arguments in COMMANDS.items():
                    seconds.setdefault(name, []).append(command_s(arguments, home))
        for _ in range(options.rounds):
            shutil.rmtree(home / ".cache" / "orchd" / "vetted", ignore_errors=True)
            seconds.setdefault("orchd serve, first", []).append(start_s(serve, other, home))
            seconds.setdefault("orchd serve", []).append(start_s(serve, other, home))
            if options.server is not None:
                peer = llama_server(options.server.resolve(), options.model, other)
                seconds.setdefault("llama-server", []).append(start_s(peer, other, home))
    print(f"| command | median of {options.rounds}, s | least | most |\n| --- | --- | --- | --- |")
    for name, measured in seconds.items():
        print(f"| `{name}` | {statistics.median(measured):.3f} | {min(measured):.3f} | {max(measured):.3f} |")


if __name__ == "__main__":
    main()
