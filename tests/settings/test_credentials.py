"""Where the one token is found, how it is made, and that nothing ever shows it."""

from __future__ import annotations

import errno
import os
import stat
import threading
import traceback
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchd.errors import ConfigError
from orchd.settings.config import Config, ServerConfig
from orchd.settings.credentials import Credentials, find_or_create_token, find_token, token_path

A, B, C, D = (letter * 20 for letter in "abcd")


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's state directory that is empty, whoever runs the tests."""
    home = tmp_path / "state-home"
    monkeypatch.setenv("XDG_STATE_HOME", str(home))
    return home / "orchd"


def token_file(path: Path, text: str, *, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def configured(*, token: str | None = None, token_file: Path | None = None) -> Config:
    server = ServerConfig(token=token, token_file=str(token_file) if token_file else None)
    return Config(server=server, source=Path("/etc/orchd.toml"))


def find(
    config: Config | None = None, flag: Path | None = None, environ: Mapping[str, str] | None = None
) -> Credentials:
    return find_or_create_token(config or Config(), token_file_flag=flag, environ=environ or {})


def refusal(config: Config | None = None, flag: Path | None = None, environ: Mapping[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        find(config, flag, environ)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_first_place_that_has_one_wins(tmp_path: Path, state: Path) -> None:
    flag, file = token_file(tmp_path / "flag", A), token_file(tmp_path / "file", D)
    both, environ = configured(token=C, token_file=file), {"ORCHD_TOKEN": B}
    assert find(both, flag, environ) == Credentials(A, f"file {flag}")
    assert find(both, None, environ) == Credentials(B, "ORCHD_TOKEN")
    assert find(both) == Credentials(C, "server.token in /etc/orchd.toml")
    assert find(configured(token_file=file)) == Credentials(D, f"file {file}")
    assert not state.exists(), "none was made"


def test_the_first_start_makes_one(state: Path) -> None:
    made = find()
    path = state / "token"
    assert made.origin == f"file {path}"
    assert made.created
    assert path == token_path()
    assert path.read_text() == f"{made.token}\n"
    assert len(made.token) == 43, "256 bits in URL-safe base 64"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    assert os.listdir(state) == ["token"], "nothing else is left"


def test_later_starts_and_clients_find_it_there() -> None:
    made = find()
    assert find() == find_token(Config(), environ={}) == Credentials(made.token, made.origin)


def test_a_client_makes_none(state: Path) -> None:
    with pytest.raises(ConfigError, match=r"token does not exist; start the server once with 'orchd serve', or set"):
        find_token(Config(), environ={})
    assert not state.exists()


def test_a_client_follows_the_same_order(tmp_path: Path) -> None:
    flag = token_file(tmp_path / "flag", A)
    assert find_token(configured(token=C), token_file_flag=flag, environ={}).token == A
    assert find_token(configured(token=C), environ={"ORCHD_TOKEN": B}).token == B
    assert find_token(configured(token=C), environ={}).token == C


def test_starts_at_the_same_time_agree_on_one() -> None:
    barrier = threading.Barrier(8)

    def start(_: int) -> Credentials:
        barrier.wait()
        return find()

    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(start, range(8)))
    assert len({credentials.token for credentials in found}) == 1
    assert [credentials.created for credentials in found].count(True) == 1


def test_a_start_that_comes_second_takes_the_token_of_the_first(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def overtaken(source: Path, target: Path) -> None:
        token_file(target, A)
        link(source, target)

    monkeypatch.setattr(os, "link", overtaken)
    assert find() == Credentials(A, f"file {state / 'token'}")
    assert os.listdir(state) == ["token"]


def test_a_full_disk_leaves_no_half_a_token(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    message = refusal()
    assert f"cannot create the token file {state / 'token'} (No space left on device)" in message
    assert "or set ORCHD_TOKEN" in message
    assert os.listdir(state) == []


def test_a_state_directory_that_cannot_be_made(tmp_path: Path, state: Path) -> None:
    state.parent.write_text("a file where the folder should be")
    message = refusal()
    assert f"cannot create the token file {state / 'token'}" in message
    assert "make its folder writable" in message


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620, 0o660])
def test_a_file_that_others_can_open_is_refused(tmp_path: Path, mode: int) -> None:
    path = token_file(tmp_path / "my token", A, mode=mode)
    message = refusal(None, path)
    assert f"token file {path} (set by --token-file) has mode {mode:04o}" in message
    assert f"chmod 600 '{path}'" in message
    assert A not in message
    assert f"chmod 600 '{path}'" in refusal(configured(token_file=path))


def test_the_file_that_orchd_made_is_held_to_the_same(state: Path) -> None:
    find()
    (state / "token").chmod(0o644)
    assert f"chmod 600 {state / 'token'}" in refusal()


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_a_newline_at_the_end_is_no_part_of_it(tmp_path: Path, end: str) -> None:
    assert find(None, token_file(tmp_path / "t", A + end)).token == A


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        ("\n\n", "is empty"),
        ("short-s3cret", "is shorter than 16 characters"),
        ("s3cret with spaces in it", "contains a space or a character outside printable ASCII"),
        ("s3cret-s3cret-s3cret\n\n", "contains a space or a character outside printable ASCII"),
        ("s3cret-s3cret-s3crét", "contains a space or a character outside printable ASCII"),
        ("s3cret-s3cret-s3cret\x07", "contains a space or a character outside printable ASCII"),
        ("s3cret" * 700, "is longer than 4096 characters"),
    ],
)
def test_a_token_that_no_header_could_carry_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    path = token_file(tmp_path / "t", text)
    for place, message in (
        (f"file {path} (set by --token-file)", refusal(None, path)),
        ("ORCHD_TOKEN", refusal(None, None, {"ORCHD_TOKEN": text})),
        ("server.token in /etc/orchd.toml", refusal(configured(token=text))),
        (
            f"file {path} (set by server.token_file in /etc/orchd.toml)",
            refusal(configured(token_file=path)),
        ),
    ):
        assert place in message
        assert problem in message
        assert "secrets.token_urlsafe(32)" in message
        assert "s3cret" not in message


def test_a_token_file_that_was_named_must_exist(tmp_path: Path) -> None:
    path = tmp_path / "none"
    message = refusal(configured(token_file=path))
    assert f"token file {path} (set by server.token_file in /etc/orchd.toml) does not exist" in message
    assert f"umask 077; python3 -c 'import secrets; print(secrets.token_urlsafe(32))' > {path}" in message
    assert not path.exists()
    environ = {"ORCHD_TOKEN_FILE": str(path)}
    assert "set by ORCHD_TOKEN_FILE" in refusal(configured(token_file=path), None, environ)


def test_a_token_file_that_is_not_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo", 0o600)
    for path in (tmp_path / "fifo", tmp_path):
        assert f"token file {path} (set by --token-file) is not a regular file" in refusal(None, path)
    assert "cannot be read (not a path)" in refusal(None, Path("a\0b"))


def test_no_repr_and_no_traceback_shows_it(tmp_path: Path) -> None:
    assert A not in repr(Credentials(A, "ORCHD_TOKEN"))
    path = token_file(tmp_path / "t", "s3cret-\xff-s3cret-s3cret")
    with pytest.raises(ConfigError) as caught:
        find(None, path)
    assert "s3cret-" not in "".join(traceback.format_exception(caught.type, caught.value, caught.tb))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.text(st.characters(codec="utf-8"), min_size=17, max_size=60))
def test_any_text_is_taken_as_it_is_or_refused_without_a_trace(text: str) -> None:
    environ = {"ORCHD_TOKEN": text}
    try:
        token = find(None, None, environ).token
    except ConfigError:
        assert text not in refusal(None, None, environ)
    else:
        assert text.rstrip("\r\n") == token
        assert token.isascii()
        assert token.isprintable()
