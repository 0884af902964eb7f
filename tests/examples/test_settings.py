"""The files in `examples/` that another program reads: each is read by that program, or as it would read it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from orchd.settings.sources import load
from testkit.account import EXAMPLES, ROOT

UNITS = ("orchd.service", "orchd-openai.service")

SERIES = {
    "gpu_utilization",
    "model_state",
    "queue_depth",
    "tasks_enqueued_total",
    "tasks_rejected_total",
    "tokens_in_total",
    "tokens_out_total",
    "vram_used_bytes",
}
"""The contract's closed list."""

WORDS = {"by", "sum", "max", "rate", "label_values"}


@pytest.mark.parametrize("path", sorted((EXAMPLES / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_a_configuration_is_read_without_complaint(path: Path) -> None:
    config = load(config_path=path, flags={}, environ={}, cwd=ROOT)
    assert config.source == path
    assert all(pool.model for pool in config.pools)


def test_the_configurations_are_for_the_machines_they_name() -> None:
    devices = {
        path.stem: [pool.devices for pool in load(config_path=path, flags={}, environ={}, cwd=ROOT).pools]
        for path in (EXAMPLES / "configs").glob("*.toml")
    }
    assert devices == {
        "cpu": [("cpu",)],
        "one_gpu": [("gpu:0",)],
        "two_mixed_gpus": [("gpu:GPU-8f5e1a2b",), ("gpu:1",)],
    }


def series_of(expression: str) -> set[str]:
    """The metric names in a PromQL expression: names that are no function, no label and no variable."""
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\b(by|without)\s*\([^)]*\)", " ", expression)
    return set(re.findall(r"[a-z_]{2,}", bare)) - WORDS


def test_the_dashboard_asks_for_our_series_and_no_others() -> None:
    dashboard = json.loads((EXAMPLES / "monitoring/grafana-dashboard.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = set().union(*(series_of(expression) for expression in expressions))
    assert asked == SERIES
    variables = [each["query"] for each in dashboard["templating"]["list"] if each["type"] == "query"]
    assert variables == ["label_values(queue_depth, pool_id)"]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


@pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="no systemd; run it on a machine that systemd has started"
)
@pytest.mark.parametrize("unit", UNITS)
def test_systemd_finds_nothing_wrong_with_a_unit(tmp_path: Path, unit: str) -> None:
    program = tmp_path / ".local/bin/orchd"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--user", str(EXAMPLES / "systemd" / unit)],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("unit", UNITS)
def test_a_units_time_limit_leaves_room_for_the_shutdown_grace(unit: str) -> None:
    text = (EXAMPLES / "systemd" / unit).read_text()
    limit = re.search(r"^TimeoutStopSec=(\d+)$", text, re.M)
    assert limit is not None
    assert int(limit[1]) > load(config_path=None, flags={}, environ={}, cwd=EXAMPLES).server.shutdown_grace_s + 5
