"""`orchd serve` as a person starts it: a subprocess, a home folder of its own, real HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
START_S = 60.0


@dataclass(frozen=True)
class ServerProcess:
    """A server that is ready.

    Attributes:
        url: Where it listens.
        token: What opens it; made by the server itself at its first start.
        env: The account's environment, in which the examples run as they are.
    """

    url: str
    token: str
    env: dict[str, str]

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def get(self, path: str) -> tuple[int, bytes]:
        request = urllib.request.Request(self.url + path, headers={"Authorization": f"Bearer {self.token}"})
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def post(self, path: str, **fields: object) -> Any:
        request = urllib.request.Request(
            self.url + path, json.dumps(fields).encode(), {"Authorization": f"Bearer {self.token}"}
        )
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.load(answer)

    def busy(self) -> int:
        """Slots in use."""
        health = json.loads(self.get("/health")[1])
        return sum(replica["busy"] for pool in health["pools"] for replica in pool["replicas"])

    def run(self, *command: str | Path, timeout_s: float = 60, **env: str) -> subprocess.CompletedProcess[str]:
        """Run an example as its first lines say."""
        return subprocess.run(
            [str(part) for part in command],
            env={**self.env, **env},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )


@contextlib.contextmanager
def serving(
    home: Path, model: Path, config: str = "", pool: str = "slots = 2\nctx = 512\nbatch = 64"
) -> Iterator[ServerProcess]:
    """Serve a model on the CPU until the context ends.

    Args:
        home: The account's home folder, empty.
        model: A GGUF file.
        config: Tables of the configuration file besides ``[[pools]]`` and ``server.port``.
        pool: Keys of the pool ``default``.
    """
    settings = home / ".config" / "orchd" / "orchd.toml"
    settings.parent.mkdir(parents=True)
    if "[server]" not in config:
        config = f"[server]\nport = 0\n{config}"
    default = f'[[pools]]\nid = "default"\nmodel = {json.dumps(str(model))}\ndevices = ["cpu"]\nthreads = 1\n{pool}\n'
    settings.write_text(f"{config}\n{default}")
    kept = {name: os.environ[name] for name in os.environ if name in ("PATH", "LANG") or name.startswith("COVERAGE_")}
    env = {**kept, "HOME": str(home), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "orchd", "serve"]
    with subprocess.Popen(
        command, env=env, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        lines: queue.Queue[str | None] = queue.Queue()
        reader = threading.Thread(target=_read, args=(process, lines))
        reader.start()
        try:
            url = _ready(lines)
            token = (home / ".local/state/orchd/token").read_text().strip()
            yield ServerProcess(url, token, {**env, "ORCHD_URL": url, "ORCHD_PORT": url.rpartition(":")[2]})
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
            reader.join()


def _read(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put(None)


def _ready(lines: queue.Queue[str | None]) -> str:
    said, deadline = "", time.monotonic() + START_S
    while True:
        line = lines.get(timeout=max(0.1, deadline - time.monotonic()))
        assert line is not None, f"orchd serve has ended:\n{said}"
        said += line
        if match := re.search(r"is ready at (http://\S+)", line):
            return match[1]
