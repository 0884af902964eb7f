"""Programs as people install them, in an environment of their own, and a bridge for them in another process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from testkit import stand_in as s
from testkit.account import EXAMPLES, ROOT
from testkit.scripted_model import serve_scripted
from testkit.stand_in import TOKEN

CLIENTS = ROOT / "build" / "openai-clients"
WAIT_S = 90


@dataclass(frozen=True)
class Programs:
    """Runs them as a user would."""

    env: dict[str, str]

    def python(self, *args: str | Path) -> str:
        """What a Python program writes to stdout."""
        return self._run(CLIENTS / "bin" / "python", *args)

    def tool(self, name: str, *args: str) -> str:
        """What a command of that environment writes to stdout."""
        return self._run(CLIENTS / "bin" / name, *args)

    def node(self, code: str) -> str:
        """What a module of Node.js writes to stdout."""
        return self._run("node", "--input-type=module", "--eval", code)

    def _run(self, *command: str | Path) -> str:
        done = subprocess.run(
            [str(part) for part in command],
            env=self.env,
            cwd=CLIENTS,
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@contextmanager
def bridge_to(server_url: str, token: str, home: Path) -> Iterator[Programs]:
    """`orchd openai` for a server, and programs that are told of it."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("ORCHD_", "XDG_", "OPENAI_"))}
    env = clean | {"HOME": str(home), "ORCHD_TOKEN": token, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "orchd", "openai", "--port", "0", "--url", server_url]
    with subprocess.Popen(command, env=env, cwd=home, stdout=subprocess.PIPE, text=True) as bridge:
        try:
            assert bridge.stdout is not None
            found = re.search(r"at (http://\S+)", bridge.stdout.readline())
            assert found is not None
            mine = {"HOME": str(home), "OPENAI_BASE_URL": found[1], "OPENAI_API_KEY": token}
            yield Programs({name: value for name, value in clean.items() if name != "PYTHONPATH"} | mine)
        finally:
            bridge.terminate()


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Programs]:
    """With a server whose model decides as it should."""
    with s.serving() as server:
        serve_scripted(server)
        with bridge_to(server.url, TOKEN, tmp_path_factory.mktemp("home")) as found:
            yield found


def example(name: str) -> Path:
    return EXAMPLES / "openai" / name
