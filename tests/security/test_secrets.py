"""Where the token is not: process lists, environments, crashes.

Logs: ``tests/http/test_auth.py``. Files and their modes: ``tests/settings/test_credentials.py``.
"""

from __future__ import annotations

import ast
import os
import signal
from pathlib import Path

import pytest

from orchd.http import auth
from testkit.process import TOKEN, call, orchd_serve


def test_the_token_is_compared_in_constant_time_and_nowhere_else() -> None:
    """Timing it would show the noise of this machine; that the one comparison is `hmac.compare_digest` can be read."""
    tree = ast.parse(Path(auth.__file__).read_text())
    uses = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "_token"]
    stored = [node for node in uses if isinstance(node.ctx, ast.Store)]
    compared = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "hmac.compare_digest"
        for argument in node.args
        if ast.unparse(argument) == "self._token"
    ]
    assert (len(stored), len(compared), len(uses)) == (1, 1, 2)


def test_the_process_list_and_a_crash_do_not_show_it(tiny_model_path: Path, tmp_path: Path) -> None:
    token_file = tmp_path / "token"
    token_file.write_text(TOKEN)
    token_file.chmod(0o600)
    arguments = ("--model", str(tiny_model_path), "--port", "0", "--token-file", str(token_file))
    with orchd_serve(*arguments, home=tmp_path, token=None) as process:
        port = process.wait_ready()
        assert call(port, "GET", "/health")[0] == 200
        proc = Path(f"/proc/{process.popen.pid}")
        assert TOKEN.encode() not in (proc / "cmdline").read_bytes() + (proc / "environ").read_bytes()
        for thread in (proc / "task").iterdir():
            assert TOKEN not in (thread / "comm").read_text()
        process.send(signal.SIGABRT)  # as llama.cpp does
        assert process.wait() == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in process.stderr
    assert TOKEN not in process.stdout + process.stderr


def test_no_flag_takes_the_token_itself() -> None:
    """What stands on a command line can be read by every account of the machine."""
    source = "".join(path.read_text() for path in (Path(auth.__file__).parents[1] / "cli").glob("*.py"))
    assert '"--token-file"' in source
    assert '"--token"' not in source


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o770, 0o720, 0o702])
def test_a_token_folder_that_others_can_write_to_is_refused(tiny_model_path: Path, tmp_path: Path, mode: int) -> None:
    """Whoever can write to the folder can put another token in the place of the file."""
    folder = tmp_path / "secrets"
    folder.mkdir()
    (folder / "token").write_text(TOKEN)
    (folder / "token").chmod(0o600)
    folder.chmod(mode)
    arguments = ("--model", str(tiny_model_path), "--port", "0", "--token-file", str(folder / "token"))
    with orchd_serve(*arguments, home=tmp_path, token=None) as process:
        assert process.wait() == 2
    assert f"chmod go-w {folder}" in process.stderr
    assert len(process.stderr.splitlines()) == 1


def test_a_sticky_folder_is_no_danger(tmp_path: Path) -> None:
    """In ``/tmp`` nobody can replace another's file."""
    from orchd.settings.credentials import _read

    folder = tmp_path / "shared"
    folder.mkdir()
    (folder / "token").write_text(TOKEN)
    (folder / "token").chmod(0o600)
    folder.chmod(0o1777)
    assert _read(folder / "token", named_by="a test") == TOKEN
    assert os.stat(folder).st_mode & 0o1000
