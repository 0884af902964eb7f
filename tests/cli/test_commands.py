"""`orchd` as a person or a script meets it: what stands on stdout, what on stderr, and the exit code."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from orchd import __version__, cli
from orchd.errors import ConfigError
from tests.support import stand_in as s
from tests.support.stand_in import TOKEN, StandIn


@pytest.fixture
def server() -> Iterator[StandIn]:
    with s.serving() as stand_in:
        yield stand_in


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An account where orchd never ran."""
    for name in [name for name in os.environ if name.startswith(("ORCHD_", "XDG_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def orchd(*args: str, stdin: str | bytes | None = None, token: str | None = TOKEN) -> Result:
    return CliRunner().invoke(cli.app, list(args), input=stdin, env={"ORCHD_TOKEN": token})


def spawn(*args: str, **streams: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "orchd", *args],
        env={**os.environ, "ORCHD_TOKEN": TOKEN, "TERM": "xterm"},
        text=True,
        # A shell's background job ignores Ctrl-C, and hands that on to what it starts: the tests, and then this.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **streams,
    )


def on_terminal(*args: str) -> tuple[str, int]:
    """What a terminal would be sent, stdout and stderr together, and the exit code."""
    master, slave = pty.openpty()
    with spawn(*args, stdin=slave, stdout=slave, stderr=slave) as process:
        os.close(slave)
        sent = b""
        try:
            while chunk := os.read(master, 4096):
                sent += chunk
        except OSError:  # Linux says so when the last process has left the terminal
            pass
        os.close(master)
        return sent.decode(), process.wait(20)


def one_line(text: str) -> str:
    assert text.startswith("orchd: ")
    assert text.endswith("\n")
    assert text.count("\n") == 1
    assert "Traceback" not in text
    return text


def answering(server: StandIn, *pieces: str, reason: str = "stop") -> None:
    server.on("POST /v1/tasks", s.accept())
    tokens = [s.token(n, piece) for n, piece in enumerate(pieces, 1)]
    server.on("GET stream", s.stream(s.started(), *tokens, s.end(len(pieces) + 1, reason)))


# Everywhere


@pytest.mark.parametrize("command", [[], ["serve"], ["health"], ["run"], ["reload"], ["check"]])
def test_help_shows_examples(command: list[str]) -> None:
    result = orchd(*command, "--help")
    assert result.exit_code == 0
    lines = [line.strip() for line in result.stdout.splitlines()]
    examples = lines[lines.index("Examples") + 1 :]
    assert any(line.startswith(f"orchd {' '.join(command)}".strip()) for line in examples)


def test_version_names_orchd_and_llama_cpp_python() -> None:
    result = orchd("--version")
    assert result.exit_code == 0
    assert f"orchd {__version__}\n" in result.stdout
    assert f"llama-cpp-python {importlib.metadata.version('llama-cpp-python')}\n" in result.stdout
    assert re.search(r"^llama.cpp \d+\.\d+\.\d+ \(ggml \d+\.\d+\.\d+\)$", result.stdout, re.MULTILINE)
    assert re.search(r"^Backends CPU(, CUDA)?$", result.stdout, re.MULTILINE)


def test_completion_is_on_offer() -> None:
    env = {**os.environ, "_ORCHD_COMPLETE": "complete_bash", "COMP_WORDS": "orchd he", "COMP_CWORD": "1"}
    done = subprocess.run([sys.executable, "-m", "orchd"], env=env, capture_output=True, text=True, timeout=30)
    assert done.stdout.split() == ["health"]


@pytest.mark.parametrize("command", [["serve"], ["health"], ["run", "hi"], ["reload", "default"]])
def test_a_wrong_configuration_is_one_line_and_2(command: list[str], home: Path) -> None:
    (home / "orchd.toml").write_text("[server]\nprot = 1\n")
    result = orchd(*command)
    assert result.exit_code == 2
    assert "orchd.toml" in one_line(result.stderr)
    assert result.stdout == ""


@pytest.mark.parametrize("command", [["health"], ["run", "hi"], ["reload", "default"]])
def test_nobody_there_is_one_line_and_2(command: list[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        result = orchd(*command, "--url", f"http://127.0.0.1:{taken.getsockname()[1]}")
    assert result.exit_code == 2
    assert "orchd serve" in one_line(result.stderr)


@pytest.mark.parametrize("command", [["health"], ["run", "hi"], ["reload", "default"]])
def test_the_wrong_token_is_one_line_and_2(command: list[str], server: StandIn) -> None:
    result = orchd(*command, "--url", server.url, token="another-token-0123456789")
    assert result.exit_code == 2
    assert "does not take this token" in one_line(result.stderr)
    assert "--token-file" in result.stderr


@pytest.mark.parametrize("command", [["health"], ["run", "hi"], ["reload", "default"]])
def test_no_token_yet_is_one_line_and_2(command: list[str]) -> None:
    result = orchd(*command, token=None)
    assert result.exit_code == 2
    assert "orchd serve" in one_line(result.stderr)


def test_an_address_that_is_none_is_one_line_and_2() -> None:
    result = orchd("health", "--url", "localhost:8737")
    assert result.exit_code == 2
    assert "http://127.0.0.1:8737" in one_line(result.stderr)


def test_the_address_comes_from_the_configuration(server: StandIn, home: Path) -> None:
    server.on("GET /health", s.answer(s.health_body()))
    (home / "orchd.toml").write_text(f'[server]\nhost = "0.0.0.0"\nport = {server.url.rsplit(":", 1)[1]}\n')
    assert orchd("health").exit_code == 0


def test_the_token_comes_from_a_file(server: StandIn, home: Path) -> None:
    server.on("GET /health", s.answer(s.health_body()))
    file = home / "secret"
    file.touch(mode=0o600)
    file.write_text(TOKEN + "\n")
    assert orchd("health", "--url", server.url, "--token-file", str(file), token=None).exit_code == 0


# Health


def test_health_of_a_server_that_is_ready(server: StandIn) -> None:
    server.on("GET /health", s.answer(s.health_body()))
    result = orchd("health", "--url", server.url)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0] == "ok"
    assert result.stdout.splitlines()[2].split() == ["default", "tiny-llama", "0", "cpu", "ready", "1/4"]
    assert "\x1b" not in result.stdout


@pytest.mark.parametrize("status", ["loading", "degraded"])
def test_health_of_a_server_that_is_not_ready_is_1(server: StandIn, status: str) -> None:
    server.on("GET /health", s.answer(s.health_body(status=status), status=503))
    result = orchd("health", "--url", server.url, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout) == s.health_body(status=status)


def test_no_color_is_heard(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    server.on("GET /health", s.answer(s.health_body()))
    assert "\x1b[1;32mok" in on_terminal("health", "--url", server.url)[0]
    monkeypatch.setenv("NO_COLOR", "1")
    assert "32m" not in on_terminal("health", "--url", server.url)[0]


def test_a_pipe_gets_no_colour_even_if_the_environment_forces_it(
    server: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.on("GET /health", s.answer(s.health_body()))
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b" not in orchd("health", "--url", server.url).stdout


# Run


def test_run_prints_the_text_and_nothing_else(server: StandIn) -> None:
    answering(server, "The", " Rhône")
    result = orchd("run", "Name a river.", "--url", server.url)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "The Rhône", "")
    assert server.seen[0].body["messages"] == [{"role": "user", "content": "Name a river."}]


def test_run_sends_what_it_was_told(server: StandIn) -> None:
    answering(server, "x")
    options = "--pool p --model-ref m --priority batch --max-tokens 5 --seed 7 --temperature 0 --stop A --stop B"
    orchd("run", "hi", "--system", "Be brief.", *options.split(), "--url", server.url)
    body = server.seen[0].body
    del body["task_id"]
    assert body == {
        "pool_id": "p",
        "model_ref": "m",
        "priority": "batch",
        "max_tokens": 5,
        "seed": 7,
        "temperature": 0,
        "stop": ["A", "B"],
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}],
    }


@pytest.mark.parametrize(("flags", "content"), [([], "from stdin"), (["--raw"], "from stdin\n")])
def test_run_reads_stdin(server: StandIn, flags: list[str], content: str) -> None:
    answering(server, "x")
    orchd("run", "-", *flags, "--url", server.url, stdin="from stdin\n")
    body = server.seen[0].body
    assert (body["prompt"] if flags else body["messages"][0]["content"]) == content


def test_stdin_that_is_no_text_is_one_line_and_2(server: StandIn) -> None:
    result = orchd("run", "-", "--url", server.url, stdin=b"ab\xff")
    assert result.exit_code == 2
    assert "not UTF-8 at byte 2" in one_line(result.stderr)
    assert server.seen == []


def test_an_argument_that_is_no_text_is_one_line_and_2(server: StandIn) -> None:
    result = orchd("run", "caf\udce9", "--url", server.url)
    assert result.exit_code == 2
    assert "not UTF-8" in one_line(result.stderr)
    assert server.seen == []


def test_a_terminal_without_unicode_is_no_reason_to_fail(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    answering(server, "Rhône")
    assert on_terminal("run", "hi", "--url", server.url) == ("Rh?ne\r\n", 0)


def test_a_system_message_without_a_template_is_a_wrong_option(server: StandIn) -> None:
    result = orchd("run", "hi", "--raw", "--system", "x", "--url", server.url)
    assert result.exit_code == 2
    assert server.seen == []


def test_run_as_json_is_one_object_at_the_end(server: StandIn) -> None:
    answering(server, "The", " Rhône", reason="length")
    result = orchd("run", "hi", "--json", "--url", server.url)
    answer = json.loads(result.stdout)
    assert answer.pop("task_id") == server.seen[0].body["task_id"]
    assert answer == {"text": "The Rhône", "finish_reason": "length", "tokens_out": 2, "decode_ms": 12}
    assert result.exit_code == 0


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_task_that_fails_is_1(server: StandIn, flags: list[str]) -> None:
    error = {"code": "WORKER_RESET", "message": "The step failed.", "engine": "llamacpp"}
    server.on("POST /v1/tasks", s.accept())
    server.on("GET stream", s.stream(s.started(), s.token(1, "The"), s.end(2, "error", error=error)))
    result = orchd("run", "hi", *flags, "--url", server.url)
    assert result.exit_code == 1
    assert one_line(result.stderr) == "orchd: The step failed.\n"
    assert json.loads(result.stdout)["error"] == error if flags else result.stdout == "The"


@pytest.mark.parametrize(
    ("status", "code"), [(400, "INVALID_PARAMS"), (429, "ADMISSION_REJECT"), (503, "POOL_UNREADY")]
)
def test_a_refusal_is_1(server: StandIn, status: int, code: str) -> None:
    server.on("POST /v1/tasks", s.refuse(status, code, "Not like this.", {"Retry-After": "9"}))
    result = orchd("run", "hi", "--url", server.url)
    assert (result.exit_code, result.stderr) == (1, "orchd: Not like this.\n")


def test_run_waits_for_room_if_told_to(server: StandIn) -> None:
    server.on("POST /v1/tasks", s.refuse(429, "ADMISSION_REJECT", "Full.", {"X-Backoff-Ms": "10"}))
    answering(server, "x")
    assert orchd("run", "hi", "--wait", "30", "--url", server.url).stdout == "x"


def test_a_terminal_gets_a_newline_and_no_control_characters_from_the_model(server: StandIn) -> None:
    answering(server, "a\x1b]0;title\x07", "\tb")
    sent, code = on_terminal("run", "hi", "--url", server.url)
    assert (sent, code) == ("a␛]0;title␇\tb\r\n", 0)


def test_a_pipe_gets_the_models_text_as_it_is(server: StandIn) -> None:
    answering(server, "a\x1b[31m")
    assert orchd("run", "hi", "--url", server.url).stdout == "a\x1b[31m"


def test_a_terminal_sees_its_place_in_the_queue_until_text_comes(server: StandIn) -> None:
    server.on("POST /v1/tasks", s.accept(queue_position=3, predicted_start_ms=900))
    server.on("GET stream", s.stream(s.started(), s.token(1, "text"), s.end(2)))
    sent, code = on_terminal("run", "hi", "--url", server.url)
    assert "waiting, 3 ahead" in sent
    assert sent.index("waiting") < sent.index("text")
    assert code == 0


def test_ctrl_c_leaves_the_stream_with_130(server: StandIn) -> None:
    server.on("POST /v1/tasks", s.accept())
    server.on("GET stream", s.stream(s.started(), s.token(1, "The"), then="stay"))
    with spawn("run", "hi", "--url", server.url, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(3) == "The"
        process.send_signal(signal.SIGINT)
        assert server.left.wait(10)
        rest, errors = process.communicate(timeout=10)
    assert (process.returncode, rest, errors) == (130, "", "")


def test_a_reader_that_leaves_is_no_error_to_talk_about(server: StandIn) -> None:
    server.on("POST /v1/tasks", s.accept())
    server.on("GET stream", s.stream(s.started(), *[s.token(n, "x" * 1000) for n in range(1, 200)], then="stay"))
    with spawn("run", "hi", "--url", server.url, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert server.left.wait(10)
        assert process.stderr.read() == ""
        assert process.wait(10) == 141


# Reload


def test_reload_tells_the_old_and_the_new_model(server: StandIn) -> None:
    server.on("GET /health", s.answer(s.health_body(model_id="old")))
    server.on("POST reload", s.answer({"pool_id": "default", "model_id": "new"}))
    result = orchd("reload", "default", "new.gguf", "--url", server.url)
    assert result.exit_code == 0
    assert result.stdout.startswith("default: old → new in ")
    assert server.requests("POST reload")[0].body == {"new_model_ref": "new.gguf"}


def test_reload_as_json(server: StandIn) -> None:
    server.on("GET /health", s.answer(s.health_body(model_id="old")))
    server.on("POST reload", s.answer({"pool_id": "default", "model_id": "new"}))
    answer = json.loads(orchd("reload", "default", "--json", "--url", server.url).stdout)
    assert answer.pop("seconds") >= 0
    assert answer == {"pool_id": "default", "old_model_id": "old", "model_id": "new"}


@pytest.mark.parametrize(("status", "code"), [(422, "RELOAD_FAILED"), (409, "RELOAD_IN_PROGRESS"), (404, "NOT_FOUND")])
def test_a_reload_that_is_refused_is_1(server: StandIn, status: int, code: str) -> None:
    server.on("GET /health", s.answer(s.health_body()))
    server.on("POST reload", s.refuse(status, code, "Not a GGUF; the old model still serves."))
    result = orchd("reload", "default", "bad.gguf", "--url", server.url)
    assert result.exit_code == 1
    assert "old model still serves" in one_line(result.stderr)
    assert result.stdout == ""


def test_a_terminal_sees_that_a_reload_is_under_way(server: StandIn) -> None:
    server.on("GET /health", s.answer(s.health_body(model_id="old")))
    server.on("POST reload", s.answer({"pool_id": "default", "model_id": "new"}))
    sent, _ = on_terminal("reload", "default", "--url", server.url)
    assert "reloading default" in sent
    assert "default: old → new in " in sent


# Serve


def serving_with(monkeypatch: pytest.MonkeyPatch, serve: object) -> None:
    module = types.ModuleType("orchd.server")
    vars(module)["serve"] = serve
    monkeypatch.setitem(sys.modules, "orchd.server", module)
    monkeypatch.setattr("orchd.server", module, raising=False)


def test_serve_puts_its_options_into_the_configuration(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    given: list[Any] = []

    def serve(config: object, credentials: object, *, observer: object) -> int:
        given.extend([config, credentials])
        return 0

    serving_with(monkeypatch, serve)
    options = "--host ::1 --port 9000 -m x.gguf --device cpu --device cpu --slots 8 --ctx 2048"
    assert orchd("serve", *options.split()).exit_code == 0
    config, credentials = given
    assert (config.server.host, config.server.port) == ("::1", 9000)
    [pool] = config.pools
    assert Path(pool.model).name == "x.gguf"
    assert (pool.devices, pool.slots, pool.ctx) == (("cpu", "cpu"), 8, 2048)
    assert credentials.token == TOKEN


def test_serve_leaves_with_the_servers_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    serving_with(monkeypatch, lambda config, credentials, *, observer: 3)
    assert orchd("serve").exit_code == 3


def test_a_configuration_error_of_the_server_is_one_line_and_2(monkeypatch: pytest.MonkeyPatch) -> None:
    def serve(config: object, credentials: object, *, observer: object) -> int:
        raise ConfigError("port 8737 is taken;\nchoose another with --port")

    serving_with(monkeypatch, serve)
    result = orchd("serve")
    assert result.exit_code == 2
    assert one_line(result.stderr) == "orchd: port 8737 is taken; choose another with --port\n"
    assert result.stdout == ""
