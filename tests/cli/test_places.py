"""Folders, files and addresses that cannot be used: one line and 2, whichever command meets them."""

from __future__ import annotations

import json
import os
import pwd
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from testkit import stand_in as s
from testkit.stand_in import TOKEN, StandIn
from tests.cli.shell import one_line, orchd

COMMANDS = [["serve"], ["health"], ["run", "hi"], ["reload", "default"], ["check"]]


def refusal(*command: str, token: str | None = TOKEN) -> str:
    result = orchd(*command, token=token)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    return one_line(result.stderr)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_working_directory_that_was_deleted(command: list[str], home: Path) -> None:
    gone = home / "gone"
    gone.mkdir()
    ran = subprocess.run(
        ["sh", "-c", 'cd "$0" && rmdir "$0" && exec "$@"', str(gone), sys.executable, "-m", "orchd", *command],
        env={**os.environ, "ORCHD_TOKEN": TOKEN},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "working directory cannot be used (No such file or directory)" in one_line(ran.stderr)


HOSTS = {
    "a label that is too long": "a" * 70 + ".lan",
    "an empty label": "a..lan",
    "a space": "my box",
    "a blank": " ",
    "not ASCII and too long": "ü" * 70,
    "bytes that are not text": "caf\udce9",
}


@pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS)
def test_a_host_to_listen_on_that_is_none(host: str, tiny_model_path: Path) -> None:
    line = refusal("serve", "--host", host, "-m", str(tiny_model_path), "--device", "cpu")
    assert "server.host" in line
    assert "use 127.0.0.1" in line


IN_A_FILE = {name: host for name, host in HOSTS.items() if host.isprintable()} | {"a NUL": "a\0b"}


@pytest.mark.parametrize("host", IN_A_FILE.values(), ids=IN_A_FILE)
def test_check_finds_a_host_that_is_none(host: str, home: Path, tiny_model_path: Path) -> None:
    (home / "orchd.toml").write_text(f"[server]\nhost = {json.dumps(host)}\n")
    result = orchd("check", "-m", str(tiny_model_path), "--ctx", "256", "--port", "0")
    assert result.exit_code == 1
    assert "problem: server.host" in result.stdout


@pytest.mark.parametrize("host", [*HOSTS.values()], ids=HOSTS)
@pytest.mark.parametrize("command", [["health"], ["run", "hi"], ["reload", "default"]], ids=lambda command: command[0])
def test_a_host_to_connect_to_that_is_none(command: list[str], host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refusal(*command, "--url", f"http://{host}:8737")
    monkeypatch.setenv("ORCHD_HOST", host)
    refusal(*command)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_configuration_that_is_a_folder(command: list[str], home: Path) -> None:
    assert "Is a directory" in refusal(*command, "--config", str(home))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_configuration_that_is_a_pipe_without_a_writer_does_not_hold_up(command: list[str], home: Path) -> None:
    os.mkfifo(home / "pipe.toml")
    assert "nothing writes to this pipe" in refusal(*command, "--config", "pipe.toml")


def test_a_configuration_is_not_read_without_end(home: Path) -> None:
    (home / "orchd.toml").touch()
    os.truncate(home / "orchd.toml", 2 << 20)
    assert "larger than 1048576 bytes" in refusal("health")


def test_no_configuration_at_all_is_one(server: StandIn) -> None:
    server.on("GET /health", s.answer(s.health_body()))
    assert orchd("health", "--config", "/dev/null", "--url", server.url).exit_code == 0


def test_a_configuration_may_come_through_a_pipe(server: StandIn) -> None:
    """As in `--config <(make-config)`, whose writer may take a moment."""
    server.on("GET /health", s.answer(s.health_body()))
    port = server.url.rpartition(":")[2]
    reader, writer = os.pipe()
    maker = subprocess.Popen(["sh", "-c", f"sleep 0.3; echo '[server]'; echo port = {port}"], stdout=writer)
    os.close(writer)
    assert orchd("health", "--config", f"/dev/fd/{reader}").exit_code == 0
    os.close(reader)
    assert maker.wait(10) == 0


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_configuration_that_is_not_utf8(command: list[str], home: Path) -> None:
    (home / "orchd.toml").write_bytes(b"# caf\xe9\n")
    assert "byte 5 is not UTF-8" in refusal(*command)


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """An account that is in no list, as a container's may be."""

    def unknown(_: int) -> NoReturn:
        raise KeyError

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)


@pytest.mark.usefixtures("homeless")
@pytest.mark.parametrize("command", [["serve"], ["health"]], ids=lambda command: command[0])
def test_an_account_without_a_home_keeps_no_token(command: list[str], home: Path) -> None:
    assert "set HOME or ORCHD_TOKEN" in refusal(*command, token=None)
    assert list(home.iterdir()) == []  # not a folder named "~"


@pytest.mark.usefixtures("homeless")
def test_an_account_without_a_home_is_served_where_a_token_is_given(server: StandIn) -> None:
    server.on("GET /health", s.answer(s.health_body()))
    assert orchd("health", "--url", server.url).exit_code == 0


@pytest.mark.usefixtures("homeless")
def test_check_says_that_there_is_no_home(tiny_model_path: Path) -> None:
    result = orchd("check", "-m", str(tiny_model_path), "--ctx", "256", token=None)
    assert result.exit_code == 1
    assert "problem: this account has no home" in result.stdout


def test_a_folder_for_temporary_files_is_not_needed(
    server: StandIn, tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", "/nowhere")
    server.on("GET /health", s.answer(s.health_body()))
    assert orchd("health", "--url", server.url).exit_code == 0
    assert orchd("check", "-m", str(tiny_model_path), "--ctx", "256", "--port", "0").exit_code == 0
