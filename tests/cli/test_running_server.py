"""The commands beside a server that was started on another port than the configured one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from testkit.process import Process, call, follow, orchd_serve, submit


@pytest.fixture
def process(tmp_path: Path, tiny_model_path: Path) -> Iterator[Process]:
    """With a grace for lost listeners that outlasts every test."""
    config = tmp_path / "grace.toml"
    config.write_text(
        "[tasks]\ncancel_grace_s = 600\n"
        f"[[pools]]\nmodel = {json.dumps(str(tiny_model_path))}\ndevices = ['cpu']\nslots = 1\nctx = 100000\n"
    )
    with orchd_serve("-c", str(config), "--port", "0", home=tmp_path, token=None) as process:
        process.wait_ready()
        yield process
        process.stop()


def command(process: Process, *args: str) -> subprocess.Popen[str]:
    """From another folder of the same account, without an address, a token or a configuration."""
    (folder := process.home / "elsewhere").mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", "orchd", *args],
        cwd=folder,
        env=process.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def busy(process: Process) -> int:
    asked = command(process, "health", "--json")
    answer, complaint = asked.communicate(timeout=30)
    assert (asked.returncode, complaint) == (0, "")
    return int(json.loads(answer)["pools"][0]["replicas"][0]["busy"])


def test_the_commands_find_it_and_ctrl_c_frees_the_slot_at_once(process: Process) -> None:
    assert busy(process) == 0
    running = command(process, "run", "--raw", "--max-tokens", "90000", "the")
    assert running.stdout is not None
    assert running.stdout.read(1)
    assert busy(process) == 1
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=10)
    assert running.returncode == 130
    assert busy(process) == 0  # not within seconds: by now


def test_a_killed_server_is_not_found_any_more(process: Process) -> None:
    port = process.wait_ready()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    asked = command(process, "health")
    assert f":{port}" not in asked.communicate(timeout=30)[1]  # but the configured one, where anything may be
    assert asked.returncode == 2


def test_a_server_that_stops_takes_its_record_along(process: Process) -> None:
    servers = process.home / ".local/state/orchd/servers"
    assert len(list(servers.iterdir())) == 1
    process.stop()
    assert list(servers.iterdir()) == []


def test_verbose_logs_every_decision_and_nothing_of_llama_cpps(tmp_path: Path, tiny_model_path: Path) -> None:
    args = ("-m", str(tiny_model_path), "--device", "cpu", "--port", "0", "-v")
    with orchd_serve(*args, home=tmp_path) as process:
        port = process.wait_ready()
        task_id = submit(port, prompt="the", max_tokens=4)
        assert [kind for kind, _ in follow(port, task_id)][-1] == "end"
        process.stop()
    of_task = [line for line in process.stderr.splitlines() if task_id in line]
    assert [line.split(task_id)[1].split()[0] for line in of_task] == ["accepted:", "started:", "ended:"]
    logged = [line for line in process.stderr.splitlines() if " DEBUG " in line or " INFO " in line]
    assert all(" orchd." in line for line in logged)
    assert len(logged) < 20


def test_the_second_start_vets_nothing_and_a_reload_does(tmp_path: Path, tiny_model_path: Path) -> None:
    model = shutil.copy(tiny_model_path, tmp_path / "old.gguf")
    args = ("-m", str(model), "--device", "cpu", "--port", "0", "--ctx", "256")
    remembered = tmp_path / ".cache" / "orchd" / "vetted"
    for start in range(2):
        with orchd_serve(*args, home=tmp_path, module="tests.cli.vetting") as process:
            port = process.wait_ready()
            vetted = process.stderr.count("vetting old.gguf")
            assert vetted == (1 if start == 0 else 0)
            process.until(lambda: any(remembered.iterdir()), "the record of the file that serves")
            assert call(port, "POST", "/v1/pools/default/reload")[0] == 200
            assert process.stderr.count("vetting old.gguf") == vetted + 1
            process.stop()
