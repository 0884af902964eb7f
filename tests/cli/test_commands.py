"""What all commands have in common: help, mistakes in one line, the server and the token that they find."""

from __future__ import annotations

import importlib.metadata
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from orchd import __version__
from orchd.cli.group import COMMANDS
from testkit import stand_in as s
from testkit.stand_in import TOKEN, StandIn
from tests.cli.shell import one_line, orchd


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
