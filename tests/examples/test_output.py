"""What the pages show of a program's output is what the program prints; figures, paths and ids may differ."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shlex
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from engines.errors import OutOfDeviceMemory
from orchd import client
from orchd.cli.commands.openai import ready_screen
from orchd.client.errors import BY_STATUS
from orchd.machine import memory
from orchd.queue.events import frame
from orchd.schemas import Reasoning, Token
from testkit import harness
from testkit.account import ROOT, ServerProcess, serving
from testkit.process import orchd_serve

PAGES = [ROOT / "README.md", ROOT / "examples" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CONSOLE = re.compile(r"^```console\n(\$ .+?)^```$", re.MULTILINE | re.DOTALL)
README = (ROOT / "README.md").read_text()
NOT_RUN = ("sudo ", "make ")
TASK = "9b85eafe-c5ae-41f5-9267-c33f9a591655"
EXACT = {"code", "message", "engine", "status", "pool_id", "model_id", "device", "id"}
"""Fields whose values are those of the page."""


def blocks(page: Path) -> list[tuple[str, str]]:
    """Command and output of each block that begins with a prompt."""
    return [split(match[1]) for match in CONSOLE.finditer(page.read_text())]


def split(block: str) -> tuple[str, str]:
    """A command ends where its quotes do."""
    lines = block.removeprefix("$ ").splitlines(keepends=True)
    for end in range(1, len(lines) + 1):
        with contextlib.suppress(ValueError):
            shlex.split("".join(lines[:end]))
            return "".join(lines[:end]), "".join(lines[end:])
    raise AssertionError(block)


def shape(text: str, home: Path) -> list[str]:
    """Lines without what differs from run to run: figures, ids, widths of columns, and whose home it is."""
    text = text.replace(str(home), "/home/you")
    text = re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}", "ID", text)
    text = re.sub(r"\d+(\.\d+)?", "0", text)
    return [" ".join(line.split()) for line in text.strip().splitlines()]


def kinds(text: str) -> list[str]:
    """Lines of an answer, each once, without comments, with only the types of values that differ from run to run."""
    lines = re.sub(r"\n (?=\S)", "", text).strip().splitlines()  # an answer that is broken for the page
    return list(dict.fromkeys(_kind(line) for line in lines if line and line != "..." and not line.startswith(": ")))


def _kind(line: str) -> str:
    field, found, value = line.partition(": ") if line.startswith(("data: ", "id: ")) else ("", "", line)
    if value.startswith("{"):
        return f"{field}{found}{json.dumps(_types(json.loads(value)))}"
    return re.sub(r"\d+(\.\d+)?", "0", line)


def _types(value: object, name: str = "") -> object:
    if isinstance(value, dict):
        return {key: _types(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return [_types(item) for item in value]
    return value if name in EXACT else type(value).__name__


COMMANDS = [
    (page.name, command, shown) for page in PAGES for command, shown in blocks(page) if command.startswith("orchd ")
]


def texts(page: str) -> list[str]:
    """Blocks of a page that are output without its command."""
    return re.findall(r"^```text\n(.+?)^```$", (ROOT / "docs" / page).read_text(), re.MULTILINE | re.DOTALL)


def test_every_block_of_output_is_checked() -> None:
    """Here, or below, page by page."""
    starts = [command for page in PAGES for command, _ in blocks(page)]
    assert len(COMMANDS) >= 1
    assert all(command.startswith(("orchd ", "curl -sS", *NOT_RUN)) for command in starts)
    of_text = {page.name for page in PAGES if "```text\n" in page.read_text()}
    assert of_text == {"api.md", "index.md", "openai.md", "operations.md", "python.md"}


@pytest.mark.parametrize(("page", "command", "shown"), COMMANDS, ids=lambda value: value[:20])
def test_a_command_prints_what_its_page_shows(
    tmp_path: Path, smollm2_path: Path, page: str, command: str, shown: str
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "some.gguf").symlink_to(smollm2_path)
    ran = subprocess.run(
        [sys.executable, "-m", *shlex.split(command)],
        env={
            "HOME": str(tmp_path),
            "PYTHONPATH": str(ROOT),
            "PATH": "/usr/bin:/bin",
            "COLUMNS": "120",
            "ORCHD_PORT": "0",
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert shape(ran.stdout, tmp_path) == shape(shown, tmp_path)


def test_the_api_page_shows_what_the_server_answers(tmp_path: Path, smollm2_path: Path) -> None:
    """All its requests, one after the other, to a server with the demo model."""
    (tmp_path / "qwen2.5-0.5b.gguf").symlink_to(smollm2_path)
    with serving(tmp_path / "home", smollm2_path, f'[models]\nroots = ["{tmp_path}"]\n', pool="") as server:
        setting = f'URL={server.url}; AUTH="Authorization: Bearer {server.token}"\n'
        for command, shown in blocks(ROOT / "docs" / "api.md"):
            asked = command.replace("9b85\u2026", TASK)
            printed = server.run("bash", "-euc", setting + asked).stdout
            if "/metrics" in command:
                assert set(kinds(shown)) <= set(kinds(printed)), command
            elif shown:
                assert kinds(printed) == kinds(shown), command
            else:
                assert '"task_id"' in printed, command


def test_the_ready_screen_is_the_one_of_the_quick_start(tmp_path: Path) -> None:
    [shown] = texts("index.md")
    with orchd_serve("--port", "0", home=tmp_path, token=None) as process:
        process.wait_ready()
        printed = process.stdout
    assert shape(printed, tmp_path)[: len(shape(shown, tmp_path))] == shape(shown, tmp_path)


def test_the_first_request_of_the_readme_gets_what_the_readme_shows(server: ServerProcess) -> None:
    """With another model: the words differ, and how many there are."""
    request, shown = re.findall(r"^```(?:sh)?\n(TOKEN=.+?|\{.+?)^```$", README, re.MULTILINE | re.DOTALL)
    script = request.replace("http://127.0.0.1:8737", server.url).replace('"temperature": 0', '"max_tokens": 2')
    printed = server.run("bash", "-euc", script).stdout
    kinds = [line for line in shape(printed, Path("/nowhere")) if not line.startswith('data: {"t"')]
    wanted = [line for line in shape(shown, Path("/nowhere")) if not line.startswith(('data: {"t"', "..."))]
    assert list(dict.fromkeys(kinds)) == list(dict.fromkeys(line.replace('"stop"', '"length"') for line in wanted))


def test_the_ready_screen_of_the_bridge_is_the_one_of_its_page() -> None:
    lines = ready_screen("http://127.0.0.1:8738", "http://127.0.0.1:8737", "file /home/you/.local/state/orchd/token")
    [shown] = texts("openai.md")
    assert "\n".join(line.plain for line in lines).strip() == shown.strip()


def test_pieces_of_reasoning_are_framed_as_the_api_page_shows() -> None:
    [shown] = texts("api.md")
    reasoning, answer = (part.partition("\ndata: ")[2] for part in shown.strip().split("\n\n"))
    sent = [
        frame(8, msgspec.json.decode(reasoning, type=Reasoning)).decode(),
        frame(9, msgspec.json.decode(answer, type=Token)).decode(),
    ]
    assert re.sub(r"^id: \d+\n", "", "".join(sent), flags=re.MULTILINE).strip() == shown.strip()


def test_the_python_page_draws_the_tree_of_the_clients_errors() -> None:
    [shown] = texts("python.md")
    above: list[type[Exception]] = []
    drawn = set()
    for indent, name, rest in re.findall(r"^([ │├└─]*)(\w+)(.*)$", shown, re.MULTILINE):
        error = getattr(client, name)
        del above[len(indent) // 4 :]
        assert not above or error.__base__ is above[-1], name
        if status := re.match(r" +(\d+)", rest):
            assert BY_STATUS[int(status[1])] is error
        above.append(error)
        drawn.add(error)
    raised = {error for error in vars(client).values() if isinstance(error, type) and issubclass(error, Exception)}
    assert drawn == {error for error in raised if issubclass(error, client.ClientError)}


async def test_the_log_is_the_one_of_the_operations_page(
    caplog: pytest.LogCaptureFixture, tiny_model_path: Path
) -> None:
    caplog.set_level(logging.DEBUG, "orchd")
    async with harness.serving(tiny_model_path, pool={"slots": 1}, queue={"capacity": 1}) as served:
        served.brake.hold()
        first = await served.submit()
        await served.started(1)
        await served.submit()
        assert (await served.post(prompt="x", task_id=TASK)).status == 429
        served.brake.release()
        await served.events(first)
        assert (await served.request("POST", "/v1/pools/default/reload")).status == 200
    logged = {log_line(record.getMessage()) for record in caplog.records}
    [shown] = texts("operations.md")
    assert set(map(log_line, shown.strip().splitlines())) <= logged


def log_line(text: str) -> str:
    """A line of the log without what differs from run to run."""
    text = re.sub(r"(?<=^task )\S+", "ID", text)
    text = re.sub(r"(?<= on cpu)#[\d.]+", "", text)
    text = re.sub(r"serves \S+ \(before: \S+\)", "serves MODEL (before: MODEL)", text)
    return re.sub(r"(?<= )\(?\d+(\.\d+)?", "#", text)


GPU_PAGE = (ROOT / "docs" / "gpu.md").read_text()


def test_what_does_not_fit_on_a_gpu_is_refused_as_the_gpu_page_shows() -> None:
    found = re.search(r'^ +pool "chat": (.+?)\n\n', GPU_PAGE, re.MULTILINE | re.DOTALL)
    assert found
    with pytest.raises(OutOfDeviceMemory) as caught:
        memory.check_fit("llama-3.1-8b-instruct-q4_k_m.gguf", {"gpu:1": 13 << 30}, {"gpu:1": 11 << 30})
    assert shape(str(caught.value), Path("/nowhere")) == shape(" ".join(found[1].split()), Path("/nowhere"))


def without_values(text: str) -> str:
    """A message of the build, or of the page, with # for each value."""
    text = re.sub(r'"\s*\n\s*"|\\\n', "", text)
    while text != (text := re.sub(r"\$\{[^${}]*\}", "#", text)):
        pass
    return re.sub(r"\d+(\.\d+)*", "#", text)


_, _, rows = GPU_PAGE.partition("| message | what to do |\n| --- | --- |\n")
REFUSALS_OF_THE_BUILD = re.findall(r"^\| (.+?) \| ", rows.partition("\n\n")[0], re.MULTILINE)


@pytest.mark.parametrize("message", REFUSALS_OF_THE_BUILD)
def test_the_build_has_the_messages_of_the_gpu_page(message: str) -> None:
    source = without_values("\n".join(file.read_text() for file in (ROOT / "cmake").glob("*.cmake")))
    for part in re.split("[;\u2026]", message):
        assert without_values(part).strip() in source


def test_the_gpu_page_lists_refusals_of_the_build() -> None:
    assert len(REFUSALS_OF_THE_BUILD) == 6
