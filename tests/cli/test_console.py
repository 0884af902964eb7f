"""What `orchd serve` shows, on a terminal and in a pipe."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shlex
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from orchd.cli.console import ServeConsole, curl_pair, ready_screen, run_line, set_up_logging
from orchd.observer import Observer, PoolSummary, Summary
from testkit import stand_in as s
from testkit.stand_in import TOKEN

LABEL = "default/0 SmolLM2-135M-Instruct on cpu"


def pool(pool_id: str = "default", *, replicas: tuple[str, ...] = ("cpu",), slots: int = 4) -> PoolSummary:
    return PoolSummary(pool_id, "SmolLM2-135M-Instruct", replicas, slots, 4096)


def summary(*pools: PoolSummary, url: str = "http://127.0.0.1:8737", token_file: str | None = "/s/token") -> Summary:
    origin = "in ORCHD_TOKEN" if token_file is None else f"in {token_file}"
    return Summary(url=url, token_origin=origin, token_file=token_file, pools=pools or (pool(),))


class Screen:
    """A console whose two streams can be read."""

    def __init__(self, *, terminal: bool) -> None:
        self._out, self._err = io.StringIO(), io.StringIO()
        self.console = ServeConsole(
            out=Console(file=self._out, force_terminal=terminal, width=60, highlight=False),
            err=Console(file=self._err, force_terminal=terminal, width=100, highlight=False),
        )
        self.observer: Observer = self.console

    @property
    def out(self) -> str:
        return self._out.getvalue()

    @property
    def err(self) -> str:
        return self._err.getvalue()


@pytest.fixture(autouse=True)
def xterm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)


def test_a_pipe_gets_a_line_per_quarter() -> None:
    screen = Screen(terminal=False)
    for percent in range(101):
        screen.observer.loading(LABEL, percent / 100)
    screen.observer.loaded(LABEL, 1.25)
    assert screen.err.splitlines() == [
        *(f"loading {LABEL}: {percent} %" for percent in (0, 25, 50, 75, 100)),
        f"loaded {LABEL} in 1.2 s",
    ]
    assert screen.out == ""


def test_replicas_load_side_by_side() -> None:
    screen = Screen(terminal=False)
    for share in (0.0, 0.1, 1.0):
        for label in ("a/0 m on cpu", "a/1 m on cpu"):
            screen.observer.loading(label, share)
    assert [line.split()[1] for line in screen.err.splitlines()] == ["a/0", "a/1"] * 2


def test_a_terminal_gets_a_bar_that_goes_away() -> None:
    screen = Screen(terminal=True)
    screen.observer.loading("other", 0.0)
    screen.observer.loading(LABEL, 0.5)
    screen.observer.loaded("other", 1.0)
    assert "loading " in screen.err
    assert "\x1b[?25h" not in screen.err  # the cursor is hidden while something loads
    screen.observer.loaded(LABEL, 1.0)
    assert "\x1b[?25h" in screen.err
    assert screen.out == ""


def test_the_screen_takes_the_bars_place() -> None:
    screen = Screen(terminal=True)
    screen.observer.loading(LABEL, 0.5)
    screen.observer.ready(summary())
    assert "\x1b[?25h" in screen.err
    assert "50%" not in screen.out


def test_close_gives_the_terminal_back_and_may_come_twice() -> None:
    screen = Screen(terminal=True)
    screen.observer.loading(LABEL, 0.1)
    screen.console.close()
    screen.console.close()
    assert "\x1b[?25h" in screen.err


def test_the_ready_screen_tells_address_token_place_and_pools() -> None:
    screen = Screen(terminal=False)
    screen.observer.ready(summary(pool(), pool("big", replicas=("gpu:0", "gpu:1"), slots=1)))
    assert "is ready at http://127.0.0.1:8737" in screen.out
    assert "token  in /s/token" in screen.out
    assert "default  SmolLM2-135M-Instruct on cpu, 4 slots of 4096 tokens" in screen.out
    assert "big      SmolLM2-135M-Instruct on gpu:0, gpu:1, 1 slot each of 4096 tokens" in screen.out
    assert "\x1b" not in screen.out


def test_equal_devices_are_counted() -> None:
    text = "\n".join(line.plain for line in ready_screen(summary(pool(replicas=("cpu", "cpu")))))
    assert "on 2 × cpu, 4 slots each" in text


def test_a_narrow_terminal_does_not_break_the_commands() -> None:
    screen = Screen(terminal=True)
    shown = summary(token_file="/home/me/" + "deep/" * 20 + "token")
    screen.observer.ready(shown)
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.out)
    submit = [line for line in plain.splitlines() if line.startswith(("sed", "  -"))]
    assert len(submit) == len(curl_pair(shown))


def test_one_screen() -> None:
    assert len(ready_screen(summary())) <= 20


def test_the_first_pool_is_named_where_there_are_several() -> None:
    assert '"pool_id"' not in "\n".join(curl_pair(summary()))
    assert '"pool_id": "a"' in "\n".join(curl_pair(summary(pool("a"), pool("b"))))


def test_without_a_file_the_token_comes_from_the_environment() -> None:
    assert '"$ORCHD_TOKEN" | curl' in curl_pair(summary(token_file=None))[0]


def test_the_first_command_is_orchds_own() -> None:
    assert run_line(summary()) == "orchd run 'Name three rivers.'"
    elsewhere = run_line(summary(pool("a"), pool("b"), url="http://127.0.0.1:9000"))
    assert elsewhere == "orchd run --url http://127.0.0.1:9000 --pool a 'Name three rivers.'"
    lines = [str(line) for line in ready_screen(summary())]
    assert lines.index(run_line(summary())) < lines.index(next(line for line in lines if "curl" in line))


@pytest.mark.parametrize("token_file", ["/s/token", None])
def test_curl_is_started_without_the_token_among_its_arguments(token_file: str | None) -> None:
    for line in curl_pair(summary(token_file=token_file)):
        after_curl = line.partition("curl")[2]
        assert "TOKEN" not in after_curl
        assert "Bearer" not in after_curl


@pytest.fixture
def server() -> Iterator[s.StandIn]:
    with s.serving() as stand_in:
        stand_in.on("POST /v1/tasks", s.accept())
        stand_in.on("GET stream", s.stream(s.started(), s.token(1, "Rhine"), s.end(2)))
        yield stand_in


@pytest.mark.parametrize("kept", ["a file", "the environment"])
def test_the_curl_pair_works_as_it_stands(server: s.StandIn, tmp_path: Path, kept: str) -> None:
    file = tmp_path / "it's a token"
    file.write_text(TOKEN + "\n")
    lines = curl_pair(summary(url=server.url, token_file=str(file) if kept == "a file" else None))
    env = {**os.environ, "ORCHD_TOKEN": TOKEN if kept == "the environment" else ""}
    done = subprocess.run(["sh", "-c", "\n".join(lines)], env=env, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Rhine" in done.stdout
    submit, stream = server.seen
    assert set(submit.body) == {"task_id", "prompt", "max_tokens"}
    assert json.loads(done.stdout.split("id: 0")[0])["task_id"] == str(uuid.UUID(submit.body["task_id"]))
    assert stream.headers["Authorization"] == f"Bearer {TOKEN}"


def test_the_commands_are_shell_words_that_hold() -> None:
    words = shlex.split(" ".join(line.rstrip("\\") for line in curl_pair(summary())))
    assert words.count("curl") == 2


@pytest.mark.parametrize(
    ("running", "line"),
    [
        (0, "stopping\n"),
        (1, "stopping: waiting for 1 running task to finish; press Ctrl-C again to quit at once\n"),
        (3, "stopping: waiting for 3 running tasks to finish; press Ctrl-C again to quit at once\n"),
    ],
)
def test_stopping_says_what_it_waits_for(running: int, line: str) -> None:
    screen = Screen(terminal=False)
    screen.observer.stopping(running)
    screen.observer.stopped()
    assert screen.err == line + "stopped\n"


def test_a_file_name_is_not_markup() -> None:
    screen = Screen(terminal=True)
    screen.observer.loading("a/0 [red]x[/red] on cpu", 0.5)
    screen.observer.loaded("a/0 [red]x[/red] on cpu", 1.0)
    assert "[red]x[/red]" in screen.err


@pytest.fixture
def loggers() -> Iterator[None]:
    kept = [(logging.getLogger(name), logging.getLogger(name).level) for name in (None, "orchd", "engines")]
    handlers = logging.getLogger().handlers[:]
    yield
    logging.getLogger().handlers[:] = handlers
    for logger, level in kept:
        logger.setLevel(level)


@pytest.mark.usefixtures("loggers")
@pytest.mark.parametrize("terminal", [True, False])
def test_even_verbose_logs_hold_nothing_of_aiohttps(terminal: bool) -> None:
    screen = Screen(terminal=terminal)
    set_up_logging(screen.console.err, verbose=True)
    logging.getLogger("aiohttp.access").info("GET /v1/tasks/x/stream?access_token=secret")
    logging.getLogger("orchd.pools.pool").debug("a decision")
    assert "a decision" in screen.err
    assert "secret" not in screen.err
