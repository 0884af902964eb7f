"""`orchd` as a person or a script meets it: what stands on stdout, what on stderr, and the exit code."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import socket
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from orchd import __version__
from orchd.cli.entry import COMMANDS
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
    code = "import sys\nfrom orchd.cli import entry\n"
    code += "try: entry.app(['check', '--help'], prog_name='orchd')\nexcept SystemExit: pass\n"
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
