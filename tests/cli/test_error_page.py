"""Each message that `docs/errors.md` lists for a start or a command is provoked, and is the one that comes."""

from __future__ import annotations

import os
import pwd
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from engines.api import DeviceSpec
from engines.errors import LoadFailed, OutOfDeviceMemory
from engines.llamacpp.native.gpus import Listed, match
from orchd.machine import gpus, memory
from orchd.machine.gpus import Gpu
from orchd.models import references
from testkit import stand_in as s
from testkit.stand_in import StandIn
from testkit.tiny_gguf import write_tiny_bert
from tests.cli.shell import orchd
from tests.cli.test_words import something_else

PAGE = (Path(__file__).parents[2] / "docs" / "errors.md").read_text()


def listed(heading: str) -> list[str]:
    """The messages in the first column of a section's table."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return [message for row in re.findall(r"^\| (`.+?) \|", section, re.MULTILINE) for message in row_messages(row)]


def row_messages(row: str) -> list[str]:
    return re.findall(r"`([^`]+)`", row.partition(" (from ")[0])


def is_like(message: str, shown: str) -> bool:
    """Whether a message is what the page shows of it: … is anything, and figures differ."""
    pattern = re.escape(shown).replace("…", ".+")
    return re.search(re.sub(r"\d+(\\\.\d+)?", r"[\\d.]+", pattern), message) is not None


class Home:
    """A home with the means to go wrong in."""

    def __init__(self, folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch, server: StandIn) -> None:
        self.folder, self.model, self.patch, self.server = folder, model, monkeypatch, server

    def says(self, *command: str, token: str | None = s.TOKEN) -> str:
        result = orchd(*command, token=token)
        assert result.exit_code in (1, 2), result.output
        return result.output

    def file(self, name: str, data: bytes) -> str:
        (self.folder / name).write_bytes(data)
        return name

    def serve(self, *options: str) -> str:
        return self.says("serve", "-m", str(self.model), *options)

    def ask(self, *arguments: str) -> str:
        return self.says("run", *(arguments or ["hi"]), "--url", self.server.url)


def unknown_key(home: Home) -> str:
    home.file("orchd.toml", b"[server]\nprot = 1\n")
    return home.says("serve")


def no_demo(home: Home) -> str:
    home.patch.setattr(references, "demo_model_path", lambda: None)
    return home.says("serve")


def damaged(home: Home) -> str:
    home.file("m.gguf", home.model.read_bytes())
    home.file("m.gguf.sha256", b"0" * 64)
    return home.says("check", "-m", "m.gguf")


def too_large(home: Home) -> str:
    with pytest.raises(OutOfDeviceMemory) as caught:
        memory.check_fit("m", {"gpu:0": 9 << 30}, {"gpu:0": 7 << 30})
    return str(caught.value)


def with_gpu(home: Home, device: str) -> str:
    home.patch.setattr(gpus, "find_gpus", lambda: [Gpu(0, "GPU-8f5e0000", "NVIDIA Test", 1 << 33)])
    home.patch.setattr("engines.llamacpp.build.gpu_backend", lambda: None)
    return home.says("check", "-m", str(home.model), "--device", device)


def no_vulkan(home: Home) -> str:
    with pytest.raises(LoadFailed) as caught:
        match(DeviceSpec("gpu", pci="0000:01:00.0"), [Listed("another card", "0000:02:00.0")])
    return str(caught.value)


def no_folder(home: Home) -> str:
    (gone := home.folder / "gone").mkdir()
    os.chdir(gone)
    gone.rmdir()
    return home.says("serve")


def no_home(home: Home) -> str:
    def unknown(_: int) -> NoReturn:
        raise KeyError

    home.patch.delenv("HOME")
    home.patch.setattr(pwd, "getpwuid", unknown)
    return home.says("serve", token=None)


def port_in_use(home: Home) -> str:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return home.serve("--port", str(taken.getsockname()[1]))


def open_token(home: Home) -> str:
    (home.folder / home.file("t", b"x" * 32)).chmod(0o644)
    return home.says("health", "--token-file", "t")


def stranger(home: Home) -> str:
    with something_else(b"SSH-2.0-OpenSSH_9.2\r\n") as port:
        return home.says("health", "--url", f"http://127.0.0.1:{port}")


def other_web_server(home: Home) -> str:
    home.server.on("GET /health", s.raw(b"<h1>no</h1>", status=404))
    return home.says("health", "--url", home.server.url)


def nobody(home: Home) -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return home.says("health", "--url", f"http://127.0.0.1:{taken.getsockname()[1]}")


def refused(status: int, code: str, message: str) -> Callable[[Home], str]:
    def provoke(home: Home) -> str:
        home.server.on("POST /v1/tasks", s.refuse(status, code, message, {"Retry-After": "12"}))
        return home.ask()

    return provoke


AT_THE_START: dict[str, Callable[[Home], str]] = {
    "unknown key": unknown_key,
    "no model is configured": no_demo,
    "… is not a GGUF file": lambda home: home.says("check", "-m", home.file("m.gguf", b"<html>")),
    "… is a Git LFS pointer": lambda home: home.says(
        "check", "-m", home.file("m.gguf", b"version https://git-lfs.github.com/spec/v1\n")
    ),
    "… is damaged": damaged,
    "… does not generate text": lambda home: home.says("check", "-m", str(write_tiny_bert(home.folder / "e.gguf"))),
    "… needs": too_large,
    "there is no gpu:1": lambda home: with_gpu(home, "gpu:1"),
    "llama.cpp was built": lambda home: with_gpu(home, "gpu:0"),
    "Vulkan shows no GPU": no_vulkan,
    "cannot listen on …; this machine": lambda home: home.serve("--host", "192.0.2.1"),
    "server.host": lambda home: home.serve("--host", "a..lan"),
    "the working directory": no_folder,
    "this account has no home": no_home,
    "cannot listen on 127": port_in_use,
    "token file": open_token,
    "no token": lambda home: home.says("health", token=None),
}

FROM_A_COMMAND: dict[str, Callable[[Home], str]] = {
    "the queue is full": refused(429, "ADMISSION_REJECT", "the queue is full (64 tasks); try again in 11.5 s"),
    "… does not speak HTTPS": lambda home: home.says("health", "--url", home.server.url.replace("http:", "https:")),
    "it does not speak HTTP": stranger,
    "it is another web server": other_web_server,
    "no answer from": nobody,
    "the server rejected": lambda home: home.says("health", "--url", home.server.url, token="another-token-012345"),
    "--temperature": lambda home: home.ask("hi", "--temperature", "9"),
    "the prompt is several": lambda home: home.ask("two", "words"),
    "… has no chat template": refused(400, "INVALID_PARAMS", "m has no chat template; send prompt instead of messages"),
}

CASES = [
    (shown, provoke)
    for heading, provokers in (("At the start", AT_THE_START), ("From a command", FROM_A_COMMAND))
    for shown in listed(heading)
    for begin, provoke in provokers.items()
    if shown.startswith(begin)
]


def test_every_message_of_the_page_is_provoked() -> None:
    shown = [*listed("At the start"), *listed("From a command")]
    assert [message for message, _ in CASES] == shown
    assert len(shown) == len(AT_THE_START) + len(FROM_A_COMMAND)


@pytest.mark.parametrize(("shown", "provoke"), CASES, ids=[shown[:40] for shown, _ in CASES])
def test_the_message_is_the_one_of_the_page(
    home: Path,
    tiny_model_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    server: StandIn,
    shown: str,
    provoke: Callable[[Home], str],
) -> None:
    message = " ".join(provoke(Home(home, tiny_model_path, monkeypatch, server)).split())
    assert is_like(message, shown), message
