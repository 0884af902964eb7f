"""Messages say what the reader typed, and what would be right."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from testkit import stand_in as s
from testkit.process import free_port, orchd_serve
from testkit.stand_in import StandIn
from tests.cli.shell import one_line, orchd


@contextlib.contextmanager
def something_else(greeting: bytes) -> Iterator[int]:
    """A port on which a stranger answers whatever it is told."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    with connection, contextlib.suppress(OSError):
                        connection.recv(1 << 16)
                        connection.sendall(greeting)

        thread = threading.Thread(target=answer)
        thread.start()
        yield listening.getsockname()[1]
        listening.shutdown(socket.SHUT_RDWR)
    thread.join(10)


def test_a_port_that_does_not_speak_http() -> None:
    with something_else(b"SSH-2.0-OpenSSH_9.2\r\n") as port:
        result = orchd("health", "--url", f"http://127.0.0.1:{port}")
    assert result.exit_code == 2
    assert "it does not speak HTTP" in one_line(result.stderr)


def test_another_web_server(server: StandIn) -> None:
    server.on("GET /health", s.raw(b"<h1>Not found</h1>", status=404))
    result = orchd("health", "--url", server.url)
    assert result.exit_code == 2
    assert "it is another web server, which answers 404 with text/html" in one_line(result.stderr)


def test_https(server: StandIn) -> None:
    result = orchd("health", "--url", server.url.replace("http://", "https://"))
    assert result.exit_code == 2
    assert "orchd never does; use http://" in one_line(result.stderr)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--host", "192.0.2.1"], "this machine does not have that address; use 127.0.0.1"),
        (["--device", "gpu"], "--device is ['gpu'], expected"),
        (["--port", "x"], "--port is 'x', expected a whole number from 0 to 65535"),
        (["--models-dir", "nowhere"], "nowhere is not a readable folder"),
    ],
)
def test_a_wrong_option_of_serve(tiny_model_path: Path, arguments: list[str], told: str) -> None:
    result = orchd("serve", "-m", str(tiny_model_path), *arguments)
    assert result.exit_code == 2
    assert told in one_line(result.stderr)


def test_a_server_for_the_whole_network_warns_once(home: Path, tiny_model_path: Path) -> None:
    arguments = ["-m", str(tiny_model_path), "--device", "cpu", "--ctx", "64", "--host", "0.0.0.0"]
    with orchd_serve(*arguments, "--port", str(free_port()), home=home) as process:
        process.wait_ready()
        process.until(lambda: "plain HTTP" in process.stderr, "the warning")
        process.stop()


def test_a_models_dir_is_what_a_reload_may_ask_for(home: Path, tiny_model_path: Path) -> None:
    folder = home / "some models"
    folder.mkdir()
    (folder / "Other-Model.Q4.gguf").write_bytes(tiny_model_path.read_bytes())
    arguments = ["-m", str(tiny_model_path), "--device", "cpu", "--ctx", "64", "--models-dir", str(folder)]
    with orchd_serve(*arguments, "--port", "0", home=home, token=s.TOKEN) as process:
        url = f"http://127.0.0.1:{process.wait_ready()}"
        missing = orchd("reload", "default", "other-model", "--url", url)
        assert "did you mean Other-Model.Q4.gguf" in one_line(missing.stderr)
        assert orchd("reload", "default", "Other-Model.Q4", "--url", url).exit_code == 0
        pinned = orchd("run", "--raw", "--model-ref", "tiny", "hi", "--url", url)
        assert "no pool serves 'tiny' now; served: Other-Model.Q4" in one_line(pinned.stderr)
        process.stop()
