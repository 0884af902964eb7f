"""Commands whose stdin, stdout or stderr is broken: one line or nothing, and never the 1 that means "no"."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchd.cli import streams
from orchd.cli.streams import Aside
from testkit.process import DEADLINE_S, TOKEN, free_port, orchd_serve, pipe_without_reader
from tests.cli.shell import one_line

COMMANDS: dict[str, str] = {
    "health": "health --url {url}",
    "run": "run --raw x --max-tokens 3 --url {url}",
    "run as JSON": "run --raw - --json --max-tokens 3 --url {url}",
    "reload": "reload default --url {url}",
    "check": "check -m {model} --ctx 256",
    "version": "--version",
    "help": "--help",
}


@pytest.fixture(scope="module")
def places(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A real server's address, and a model."""
    home = tmp_path_factory.mktemp("server")
    with orchd_serve("-m", str(tiny_model_path), "--ctx", "256", "--port", "0", home=home) as process:
        yield {"url": f"http://127.0.0.1:{process.wait_ready()}", "model": str(tiny_model_path)}


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for fd in ends:
        os.close(fd)


def orchd(
    command: str,
    redirect: str = "",
    *,
    stdout: int = subprocess.PIPE,
    stderr: int = subprocess.PIPE,
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirect}', "sh", sys.executable, "-m", "orchd", *command.split()],
        env={**os.environ, "ORCHD_TOKEN": TOKEN},
        input="the",
        stdout=stdout,
        stderr=stderr,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
@pytest.mark.parametrize(
    ("redirect", "why"), [(">&-", "Bad file descriptor"), (">/dev/full", "No space left on device")]
)
def test_an_answer_that_cannot_be_written_is_one_line_and_2(
    places: dict[str, str], command: str, redirect: str, why: str
) -> None:
    done = orchd(command.format(**places), redirect)
    assert done.returncode == 2
    assert f"cannot write to stdout ({why})" in one_line(done.stderr)


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_an_answer_whose_reader_has_left_is_nothing_and_141(places: dict[str, str], command: str) -> None:
    gone = pipe_without_reader()
    done = orchd(command.format(**places), stdout=gone)
    os.close(gone)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_with_nowhere_to_complain_to_the_answer_comes_all_the_same(places: dict[str, str], command: str) -> None:
    closed = "2>&-" if " - " in command else "<&- 2>&-"
    gone = pipe_without_reader()
    for done in (orchd(command.format(**places), closed), orchd(command.format(**places), stderr=gone)):
        assert (done.returncode, len(done.stdout) > 0) == (0, True)
    os.close(gone)


@pytest.mark.parametrize("redirect", ["2>/dev/full", "<&- >&- 2>&-"])
@pytest.mark.parametrize(
    "command",
    [
        "health --url {nobody}",
        "run - --url {nobody}",
        "reload default --url {nobody}",
        "health --no-such-option",
        "check -c none.toml",
        "serve -m none.gguf",
    ],
)
def test_what_cannot_be_complained_about_is_2_too(places: dict[str, str], command: str, redirect: str) -> None:
    done = orchd(command.format(**places, nobody=f"http://127.0.0.1:{free_port()}"), redirect)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


def test_a_prompt_from_a_stdin_that_is_closed_is_one_line_and_2(places: dict[str, str]) -> None:
    done = orchd("run - --url {url}".format(**places), "<&-")
    assert (done.returncode, done.stdout) == (2, "")
    assert "stdin is closed" in one_line(done.stderr)


def test_a_prompt_from_a_stdin_that_only_takes_is_one_line_and_2(places: dict[str, str]) -> None:
    done = orchd("run - --url {url}".format(**places), "0>/dev/null")
    assert done.returncode == 2
    assert "cannot read the prompt from stdin (Bad file descriptor)" in one_line(done.stderr)


def test_a_prompt_that_comes_slowly_through_a_non_blocking_pipe_is_read_whole(places: dict[str, str]) -> None:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    command = [sys.executable, "-m", "orchd", *"run --raw - --max-tokens 250 --url {url}".format(**places).split()]
    env = {**os.environ, "ORCHD_TOKEN": TOKEN}
    with subprocess.Popen(command, env=env, stdin=reader, stderr=subprocess.PIPE, text=True) as process:
        os.close(reader)
        os.write(writer, b"the ")
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.5)  # it waits for the rest
        os.write(writer, b"the " * 20)
        os.close(writer)
        _, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1
    assert "250" in one_line(errors)  # the whole prompt and 250 tokens do not fit into 256


def script(code: str, *, stdout: int = subprocess.DEVNULL, stderr: int = subprocess.PIPE) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code], stdout=stdout, stderr=stderr)


def test_a_defect_is_a_traceback_and_70() -> None:
    """Python's own exit code for it is 1, which is an answer here; after 2, systemd would not start a server again."""
    with script("from orchd.cli import entry\nentry.app = lambda **_: 1 / 0\nentry.main()") as process:
        _, errors = process.communicate(timeout=DEADLINE_S)
    assert b"ZeroDivisionError" in errors
    assert process.returncode == 70


@pytest.mark.parametrize("aside", ["", "s.write_aside()"])
def test_a_pipe_that_another_process_made_non_blocking_is_waited_for(pipe: tuple[int, int], aside: str) -> None:
    """Its flags are shared by everyone who has it, and one that is full for the moment is not broken."""
    reader, writer = pipe
    os.set_blocking(writer, False)
    code = f"from orchd.cli.streams import StandardStreams\ns = StandardStreams()\n{aside}\n"
    with script(f"{code}for _ in range(2000): print('x' * 99)\nprint('end')\ns.close()", stdout=writer) as process:
        data = b""
        while not data.endswith(b"end\n"):
            assert process.poll() in (None, 0)
            data += os.read(reader, 1000)
    assert len(data) == 200_004
    assert process.returncode == 0


# --- written aside


def read_until(reader: int, end: bytes) -> bytes:
    data = b""
    while not data.endswith(end):
        data += os.read(reader, 1 << 16)
    return data


def test_what_is_written_aside_comes_in_order_from_all_threads(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    aside = Aside()

    def write(name: int) -> None:
        for number in range(200):
            aside.write(writer, f"{name} {number}\n".encode())

    threads = [threading.Thread(target=write, args=[name]) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    aside.write(writer, b"end\n")
    lines = read_until(reader, b"end\n").decode().splitlines()
    for name in range(4):
        assert [line for line in lines if line.startswith(f"{name} ")] == [f"{name} {number}" for number in range(200)]


def test_what_nobody_reads_is_bounded_and_counted(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    aside = Aside()
    line = b"x" * 1023 + b"\n"
    began = time.monotonic()
    count = 3 * streams.MOST_WAITING_BYTES // len(line)
    for _ in range(count):
        aside.write(writer, line)
    aside.drain(0.01)  # gives up
    assert time.monotonic() - began < 5
    got = read_until(reader, b"could not be written here\n")
    *lines, note = got.splitlines(keepends=True)
    assert set(lines) == {line}
    assert streams.MOST_WAITING_BYTES <= len(lines) * len(line) <= streams.MOST_WAITING_BYTES + (1 << 17)
    assert note == b"orchd: %d lines could not be written here\n" % (count - len(lines))
    aside.write(writer, b"as before\n")
    assert read_until(reader, b"\n") == b"as before\n"


def test_a_disk_that_has_room_again_is_written_again(tmp_path: Path) -> None:
    fd = os.open("/dev/full", os.O_WRONLY)
    aside = Aside()
    aside.write(fd, b"lost\nlost\n")
    aside.drain(5)
    file = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(file, fd)
    aside.write(fd, b"kept\n")
    aside.drain(5)
    assert (tmp_path / "log").read_bytes() == b"kept\norchd: 2 lines could not be written here\n"
    for opened in (fd, file):
        os.close(opened)


def test_two_files_do_not_wait_for_each_other(pipe: tuple[int, int]) -> None:
    """stderr that nobody reads, and a ready screen on stdout."""
    code = "import sys\nfrom orchd.cli.streams import StandardStreams\ns = StandardStreams()\ns.write_aside()\n"
    code += "print('x' * 200_000, file=sys.stderr)\nprint('ready')\ns.close()"
    with script(code, stdout=subprocess.PIPE, stderr=pipe[1]) as process:
        assert process.communicate(timeout=DEADLINE_S)[0] == b"ready\n"
    assert process.returncode == 0
