"""`orchd serve` as a person starts it in a new account, and the examples that the person runs there."""

from __future__ import annotations

import contextlib
import json
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from testkit.process import orchd_serve

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


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
    with orchd_serve(home=home, token=None) as process:
        port = process.wait_ready()
        token = (home / ".local/state/orchd/token").read_text().strip()
        url = f"http://127.0.0.1:{port}"
        yield ServerProcess(url, token, {**process.environ, "ORCHD_URL": url, "ORCHD_PORT": str(port)})
        process.stop()
