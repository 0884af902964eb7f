"""The records that servers leave, and which server a client finds."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from orchd.errors import ConfigError
from orchd.settings.discovery import find_server
from orchd.settings.running import RunningServer, announced, running_servers

TOKEN = "a-token-of-the-account-0123456789"
DEFAULT = "http://127.0.0.1:8737"
OTHER = "http://127.0.0.1:9000"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An account whose server has made its token."""
    for name in list(os.environ):
        if name.startswith(("ORCHD_", "XDG_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    token = tmp_path / ".local/state/orchd/token"
    token.parent.mkdir(parents=True)
    token.touch(0o600)
    token.write_text(TOKEN)
    return tmp_path


@pytest.fixture
def alive() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def server(url: str, *, config: Path | None = None, token_file: Path | None = None) -> RunningServer:
    return RunningServer(url, None if config is None else str(config), None if token_file is None else str(token_file))


def records(home: Path) -> list[Path]:
    return sorted((home / ".local/state/orchd/servers").iterdir())


# --- records ---------------------------------------------------------------------------------------------------------


def test_a_server_is_found_for_as_long_as_it_runs(home: Path) -> None:
    with announced(server(OTHER)):
        assert running_servers() == [server(OTHER)]
    assert running_servers() == []
    assert records(home) == []


def test_a_killed_server_is_gone_and_its_record_goes_with_the_next_start(home: Path) -> None:
    program = (
        "import os, signal; from orchd.settings.running import *\n"
        f"with announced(RunningServer({OTHER!r}, None, None)): os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", program], check=False, env=os.environ, timeout=30)
    [left] = records(home)
    assert running_servers() == []
    with announced(server(DEFAULT)):
        assert running_servers() == [server(DEFAULT)]
        assert left not in records(home)


def test_a_record_is_only_the_accounts(home: Path) -> None:
    with announced(server(OTHER)):
        [record] = records(home)
        assert record.stat().st_mode & 0o777 == 0o600
        assert record.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("what", ["record", "folder"])
def test_a_record_that_others_could_have_written_is_left_out(home: Path, what: str) -> None:
    """A client sends its token to what is named there."""
    with announced(server(OTHER)):
        [record] = records(home)
        (record if what == "record" else record.parent).chmod(0o777)
        assert running_servers() == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"url": 1, "more": 2}', b"\xff" * 100])
def test_a_record_that_says_nothing_is_left_out(home: Path, content: bytes) -> None:
    with announced(server(OTHER)):
        [record] = records(home)
        record.write_bytes(content)
        assert running_servers() == []


def test_where_no_record_can_be_left_the_server_serves_all_the_same(home: Path) -> None:
    (home / ".local/state/orchd/servers").write_text("in the way")
    with announced(server(OTHER)):
        assert running_servers() == []


# --- which one a client finds ----------------------------------------------------------------------------------------


def test_the_server_that_runs_is_found_whatever_its_port(alive: ExitStack) -> None:
    alive.enter_context(announced(server(OTHER)))
    assert find_server() == (OTHER, TOKEN)


def test_without_any_server_it_is_the_configured_address() -> None:
    assert find_server() == (DEFAULT, TOKEN)


def test_the_one_at_the_configured_address_comes_first(alive: ExitStack) -> None:
    for url in (OTHER, DEFAULT):
        alive.enter_context(announced(server(url)))
    assert find_server() == (DEFAULT, TOKEN)


def test_one_of_several_must_be_chosen(alive: ExitStack) -> None:
    for port in (9000, 9001):
        alive.enter_context(announced(server(f"http://127.0.0.1:{port}")))
    with pytest.raises(ConfigError, match=r"several servers run .*http://127.0.0.1:900.*choose one with --url"):
        find_server()
    assert find_server(url=OTHER) == (OTHER, TOKEN)


def test_a_configuration_leads_to_its_own_server_only(home: Path, alive: ExitStack) -> None:
    mine, another = home / "mine.toml", home / "another.toml"
    for path in (mine, another):
        path.write_text("[server]\nport = 8000\n")
    alive.enter_context(announced(server(OTHER, config=mine)))
    assert find_server(config_path=mine)[0] == OTHER
    assert find_server(config_path=Path("./mine.toml"))[0] == OTHER
    assert find_server(config_path=another)[0] == "http://127.0.0.1:8000"
    assert find_server()[0] == OTHER


def test_port_0_is_the_port_that_was_picked(home: Path, alive: ExitStack) -> None:
    (home / "orchd.toml").write_text("[server]\nport = 0\n")
    with pytest.raises(ConfigError, match=r"no server with this configuration runs .* --url"):
        find_server()
    alive.enter_context(announced(server(OTHER, config=home / "orchd.toml")))
    assert find_server()[0] == OTHER


def test_what_the_environment_names_is_meant(alive: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forwarded port, say: another machine's server, which has no record here."""
    alive.enter_context(announced(server(OTHER)))
    monkeypatch.setenv("ORCHD_PORT", "9500")
    assert find_server()[0] == "http://127.0.0.1:9500"


def test_the_servers_token_file_is_used_where_no_other_is_named(
    home: Path, alive: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = home / "own.token"
    own.touch(0o600)
    own.write_text("another-token-0123456789")
    alive.enter_context(announced(server(OTHER, token_file=own)))
    assert find_server() == (OTHER, "another-token-0123456789")
    assert find_server(url=f"{OTHER}/") == (f"{OTHER}/", "another-token-0123456789")
    assert find_server(url=DEFAULT) == (DEFAULT, TOKEN)  # not the one that says so
    monkeypatch.setenv("ORCHD_TOKEN", "a-third-token-0123456789")
    assert find_server() == (OTHER, "a-third-token-0123456789")
