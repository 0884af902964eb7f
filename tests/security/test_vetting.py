"""The process that opens strangers' files: its limits. What it is told and not told: ``tests/reload/test_vet.py``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from testkit.tiny_gguf import write_tiny_llama

LIMITS = """
import json, resource
from engines.llamacpp import examination
examination._limit(10**9)
kinds = resource.RLIMIT_CORE, resource.RLIMIT_AS, resource.RLIMIT_CPU
print(json.dumps([resource.getrlimit(kind)[0] for kind in kinds]))
"""


def run(*command: str, shell_limits: str = "true") -> str:
    script = f'{shell_limits}; exec "$0" "$@"'
    done = subprocess.run(["sh", "-c", script, sys.executable, *command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_writes_no_core_and_has_bounded_memory_and_time() -> None:
    core, memory, cpu_s = json.loads(run("-c", LIMITS))
    assert core == 0
    assert memory == 3 * 10**9 + 16 * 2**30
    assert cpu_s == 2 * 60 + 10


def test_lower_limits_of_the_account_stay(tmp_path: Path) -> None:
    """It used to end with a ValueError where ``ulimit -v`` was set at all, and no model could be served."""
    core, memory, cpu_s = json.loads(run("-c", LIMITS, shell_limits="ulimit -v 8000000; ulimit -t 50"))
    assert (core, memory, cpu_s) == (0, 8000000 * 1024 - 1, 49)
    model = write_tiny_llama(tmp_path / "m.gguf")
    answer = run("-m", "engines.llamacpp.examination", str(model), "--ctx", "64", shell_limits="ulimit -v 8000000")
    assert json.loads(answer)["ok"] is True
