"""`orchd` as a person or a script meets it: what stands on stdout, what on stderr, and the exit code."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import socket
import subprocess
import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest

from orchd import __version__
from orchd.cli.group import COMMANDS
from orchd.cli.health import without_typer
from orchd.errors import ConfigError
from testkit import stand_in as s
from testkit.stand_in import TOKEN, StandIn
from tests.cli.shell import on_terminal, one_line, orchd

# Everywhere


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
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


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_has_no_types_of_flags_and_as_few_breaks_as_the_terminal_allows(
    command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 500)
    shown = orchd(*command, "--help").stdout
    assert "<bool>" not in shown
    assert "<int>" not in shown
    text = shown.partition("╭")[0]
    assert all(line.strip().endswith((".", "")) for line in text.splitlines())
    assert not re.search(r"[a-z,]\s*\n\s*[a-z]", text)


@pytest.mark.parametrize("command", [[], ["run"]])
def test_help_is_a_command_too(command: list[str]) -> None:
    assert orchd("help", *command).stdout == orchd(*command, "--help").stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["helth"], "did you mean health?"),
        (["frobnicate"], "use serve, health, "),
        (["Name three rivers."], "orchd run 'Name three rivers.'"),
        (["my model.gguf"], "orchd serve -m 'my model.gguf'"),
        (["serve", "my model.gguf"], "orchd serve -m 'my model.gguf'"),
        (["check", "m.gguf"], "orchd check -m m.gguf"),
        (["health", "x"], "'x' is one argument too many"),
    ],
)
def test_what_was_meant_is_one_line_and_2(arguments: list[str], told: str) -> None:
    result = orchd(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert told in one_line(result.stderr)


def test_a_command_imports_no_other() -> None:
    code = "import sys\nfrom orchd.cli import group\n"
    code += "try: group.app(['check', '--help'], prog_name='orchd')\nexcept SystemExit: pass\n"
    code += "print([name for name in sys.modules if name.startswith('orchd.cli.commands.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.splitlines()[-1] == "['orchd.cli.commands.check']"


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


@pytest.mark.parametrize("command", [["health"], ["status"], ["run", "hi"], ["chat"], ["reload", "default"]])
def test_nobody_there_is_one_line_and_2(command: list[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        result = orchd(*command, "--url", f"http://127.0.0.1:{taken.getsockname()[1]}")
    assert result.exit_code == 2
    assert "orchd serve" in one_line(result.stderr)


@pytest.mark.parametrize("command", [["health"], ["status"], ["run", "hi"], ["chat"], ["reload", "default"]])
def test_the_wrong_token_is_one_line_and_2(command: list[str], server: StandIn) -> None:
    result = orchd(*command, "--url", server.url, token="another-token-0123456789")
    assert result.exit_code == 2
    assert "rejected this token" in one_line(result.stderr)
    assert "--token-file" in result.stderr


@pytest.mark.parametrize("command", [["health"], ["status"], ["run", "hi"], ["chat"], ["reload", "default"]])
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
    assert json.loads(result.stdout) == s.health_body(status=status) | {"ready": False}
    assert result.stderr == ""


@pytest.mark.parametrize(("flags", "code"), [([], 0), (["--strict"], 1)])
def test_health_of_a_server_that_is_ready_and_degraded(server: StandIn, flags: list[str], code: int) -> None:
    """It has lost one of two GPUs, and `until orchd health` must end all the same."""
    body: Any = s.health_body(status="degraded")
    lost = {"id": "1", "device": "gpu:1", "alive": False, "slots": 4, "busy": 0}
    body["pools"][0] |= {"ready": True, "replicas": [*body["pools"][0]["replicas"], lost]}
    server.on("GET /health", s.answer(body))
    result = orchd("health", "--url", server.url, "--json", *flags)
    assert (result.exit_code, json.loads(result.stdout)) == (code, body | {"ready": True})
    assert one_line(result.stderr) == "orchd: ready, but degraded: not alive: default/1 on gpu:1\n"


def test_a_server_that_is_ok_but_says_503_is_not_ready(server: StandIn) -> None:
    """As while it drains: what it answers with counts."""
    server.on("GET /health", s.answer(s.health_body(), status=503))
    assert orchd("health", "--url", server.url).exit_code == 1
    assert orchd("health", "--url", server.url, "--strict").exit_code == 1


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


def test_health_imports_nothing_that_takes_long(server: StandIn) -> None:
    """Scripts and systemd call it every few seconds."""
    server.on("GET /health", s.answer(s.health_body()))
    program = (
        "import sys, orchd.cli\n"
        "try: orchd.cli.main()\n"
        "finally: print(*sorted({'aiohttp', 'rich', 'typer', 'orchd.schemas', 'asyncio'} & set(sys.modules)))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, "health", "--url", server.url],
        env={**os.environ, "ORCHD_TOKEN": TOKEN},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.splitlines()[0] == "ok"
    assert ran.stdout.splitlines()[-1] == ""


@pytest.mark.parametrize("args", [["--help"], ["--nonsense"], ["--url"], ["more"], ["--js"]])
def test_whatever_health_cannot_make_sense_of_is_typers(args: list[str]) -> None:
    assert without_typer(args) is None


@pytest.mark.parametrize(
    "answer",
    [
        s.answer([1]),
        s.answer({}),
        s.answer({"status": "ok", "pools": 1}),
        s.answer({"status": "odd", "pools": []}),
        s.answer({"status": "ok", "pools": [{"id": "x"}]}),
        s.raw(b"<html>"),
        s.raw(b"<html>", status=502),
        s.raw(b"", status=204),
    ],
)
def test_an_answer_that_is_not_orchds_is_one_line_and_2(server: StandIn, answer: s.Step) -> None:
    server.on("GET /health", answer)
    result = orchd("health", "--url", server.url)
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"the server at {server.url} does not answer like orchd" in one_line(result.stderr)


def test_what_is_no_http_is_one_line_and_2() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:

        def greet() -> None:
            connection, _ = other.accept()
            connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
            connection.close()

        greeting = threading.Thread(target=greet)
        greeting.start()
        result = orchd("health", "--url", f"http://127.0.0.1:{other.getsockname()[1]}")
        greeting.join()
    assert (result.exit_code, result.stdout) == (2, "")
    assert "does not answer like orchd" in one_line(result.stderr)


def test_a_models_name_cannot_drive_the_terminal(server: StandIn) -> None:
    server.on("GET /health", s.answer(s.health_body(model_id="\x1b[2Jx")))
    assert "\x1b" not in orchd("health", "--url", server.url).stdout


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
    module = types.ModuleType("orchd.serve")
    vars(module)["serve"] = serve
    monkeypatch.setitem(sys.modules, "orchd.serve", module)
    monkeypatch.setattr("orchd.serve", module, raising=False)


def test_serve_puts_its_options_into_the_configuration(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    given: list[Any] = []

    def serve(config: object, credentials: object, *, observer: object, last_words: object) -> int:
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
    serving_with(monkeypatch, lambda config, credentials, *, observer, last_words: 3)
    assert orchd("serve").exit_code == 3


def test_a_configuration_error_of_the_server_is_one_line_and_2(monkeypatch: pytest.MonkeyPatch) -> None:
    def serve(config: object, credentials: object, *, observer: object, last_words: object) -> int:
        raise ConfigError("port 8737 is taken;\nchoose another with --port")

    serving_with(monkeypatch, serve)
    result = orchd("serve")
    assert result.exit_code == 2
    assert one_line(result.stderr) == "orchd: port 8737 is taken; choose another with --port\n"
    assert result.stdout == ""
