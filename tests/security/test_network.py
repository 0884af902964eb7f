"""The server reaches nobody: it answers those who reach it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def test_with_loopback_only_it_does_all_it_does_and_tries_nothing_else(tiny_model_path: Path, tmp_path: Path) -> None:
    """The kernel counts what finds no route out of the namespace: native code and name look-ups included."""
    namespace = ["unshare", "--map-root-user", "--net", "sh", "-ec", 'ip link set lo up; exec "$0" "$@"']
    if subprocess.run([*namespace, "true"], capture_output=True, check=False).returncode:
        pytest.skip(
            "no network namespaces for this account; sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0"
        )
    command = [*namespace, sys.executable, "-m", "tests.security.namespaced", str(tmp_path), str(tiny_model_path)]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=90, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["deliberate"] > 0, "the counter counts"
    assert found["server"] == 0
