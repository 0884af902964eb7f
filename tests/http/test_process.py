"""`orchd serve` as a process: what it tells when it is ready, how it stops, and how it refuses to start."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from testkit.process import Process, call, follow, orchd_serve, submit

LONG = {"prompt": "the", "ignore_eos": True, "temperature": 0}


def _long_pool(model: Path, home: Path) -> tuple[str, ...]:
    """Arguments for a pool with one slot for a task of many tokens, at a pace that other processes do not upset."""
    (home / "orchd.toml").write_text(f"[[pools]]\nmodel = '{model}'\nslots = 1\nctx = 60000\nthreads = 1\n")
    return "--port", "0"


def _curl_pair(process: Process) -> str:
    """The commands of the ready screen, as a person would copy them."""
    screen = process.stdout.partition("Try it from another shell:\n")[2]
    run, _, pair = screen.strip().partition("\n")
    assert run.startswith("orchd run ")
    assert pair.count("curl ") == 2
    return pair


# --- ready -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["an-environment-token-0123", None], ids=["ORCHD_TOKEN", "its own token"])
def test_the_curl_pair_of_the_ready_screen_works_verbatim(
    tiny_model_path: Path, tmp_path: Path, token: str | None
) -> None:
    assert shutil.which("curl"), "curl is not installed; on Debian and Ubuntu: sudo apt install curl"
    with orchd_serve("--model", str(tiny_model_path), "--port", "0", home=tmp_path, token=token) as process:
        process.wait_ready()
        ran = subprocess.run(
            ["sh", "-ec", _curl_pair(process)], env=process.environ, capture_output=True, text=True, timeout=30
        )
        if token is not None:
            assert token not in process.stdout + process.stderr
    assert (ran.returncode, ran.stderr) == (0, "")
    accepted, _, stream = ran.stdout.partition("\n")
    assert set(json.loads(accepted)) == {"task_id", "queue_position", "predicted_start_ms", "backoff_ms"}
    assert stream.startswith("id: 0\nevent: started\n")
    assert '"tokens_out":48' in stream.splitlines()[-2]


def test_the_token_it_makes_is_for_its_owner_alone(tiny_model_path: Path, tmp_path: Path) -> None:
    with orchd_serve("-m", str(tiny_model_path), "--port", "0", home=tmp_path, token=None) as process:
        port = process.wait_ready()
        (file,) = tmp_path.glob("**/orchd/token")
        assert file.stat().st_mode & 0o777 == 0o600
        assert str(file) in process.stdout
        token = file.read_text().strip()
        assert token not in process.stdout + process.stderr
        assert call(port, "GET", "/health", token=token)[0] == 200
        assert call(port, "GET", "/health", token="x" * 43)[0] == 401


def test_the_demo_model_answers_messages(tmp_path: Path, smollm2_path: Path) -> None:
    with orchd_serve("--port", "0", "--ctx", "256", home=tmp_path) as process:
        port = process.wait_ready()
        assert smollm2_path.stem in process.stdout
        question = [{"role": "user", "content": "What is the capital of France? Answer in English."}]
        events = list(follow(port, submit(port, messages=question, temperature=0, max_tokens=24)))
    text = "".join(data["t"] for kind, data in events if kind == "token")
    assert "Paris" in text
    assert "<|" not in text


# --- stopping --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_lets_running_tasks_finish_and_admits_nothing(
    tiny_model_path: Path, tmp_path: Path, number: signal.Signals
) -> None:
    with orchd_serve(*_long_pool(tiny_model_path, tmp_path), home=tmp_path) as process:
        port = process.wait_ready()
        stream = follow(port, submit(port, **LONG, max_tokens=1500))
        assert [next(stream)[0] for _ in range(5)] == ["started", *["token"] * 4]
        waiting = follow(port, submit(port, **LONG, max_tokens=5))
        process.send(number)
        process.until(lambda: "stopping" in process.stderr, "a line about it")
        status, response = call(port, "POST", "/v1/tasks", {"prompt": "the"})
        error = json.loads(response.read())
        assert (status, error["code"]) == (503, "POOL_UNREADY")
        assert int(response.headers["Retry-After"]) >= 1
        assert [(kind, data["finish_reason"]) for kind, data in waiting] == [("end", "cancelled")]
        *_, (kind, end) = stream
        assert (kind, end["finish_reason"], end["tokens_out"]) == ("end", "length", 1500)
        assert process.wait() == 0
    assert "Traceback" not in process.stderr


def test_what_does_not_finish_within_the_grace_is_cancelled(tiny_model_path: Path, tmp_path: Path) -> None:
    with orchd_serve(*_long_pool(tiny_model_path, tmp_path), home=tmp_path, ORCHD_SHUTDOWN_GRACE_S="0.2") as process:
        port = process.wait_ready()
        stream = follow(port, submit(port, **LONG, max_tokens=59_000))
        assert next(stream)[0] == "started"
        process.send(signal.SIGTERM)
        *_, (kind, end) = stream
        assert (kind, end["finish_reason"]) == ("end", "cancelled")
        assert process.wait() == 0
    assert "Traceback" not in process.stderr


def test_a_second_signal_leaves_at_once(tiny_model_path: Path, tmp_path: Path) -> None:
    with orchd_serve(*_long_pool(tiny_model_path, tmp_path), home=tmp_path) as process:
        port = process.wait_ready()
        stream = follow(port, submit(port, **LONG, max_tokens=59_000))
        assert next(stream)[0] == "started"
        process.send(signal.SIGINT)
        process.until(lambda: "stopping" in process.stderr, "a line about it")
        began = time.monotonic()
        process.send(signal.SIGINT)
        assert process.wait() == 130
        assert time.monotonic() - began < 2
    assert "Traceback" not in process.stderr


def test_an_idle_server_stops_at_once_though_clients_stay_connected(tiny_model_path: Path, tmp_path: Path) -> None:
    with orchd_serve("--model", str(tiny_model_path), "--port", "0", home=tmp_path) as process:
        port = process.wait_ready()
        _, response = call(port, "GET", "/health")
        response.read()  # the connection is kept alive
        with socket.create_connection(("127.0.0.1", port)):
            began = time.monotonic()
            process.send(signal.SIGTERM)
            assert process.wait() == 0
        assert time.monotonic() - began < 3


def test_after_a_kill_it_serves_again_on_the_same_port(tiny_model_path: Path, tmp_path: Path) -> None:
    with orchd_serve("--model", str(tiny_model_path), "--port", "0", home=tmp_path) as process:
        port = process.wait_ready()
        stream = follow(port, submit(port, **LONG, max_tokens=4000))
        next(stream)
        process.send(signal.SIGKILL)
        process.wait()
        with orchd_serve("--model", str(tiny_model_path), "--port", str(port), home=tmp_path) as again:
            assert again.wait_ready() == port
            *_, (kind, end) = follow(port, submit(port, **LONG, max_tokens=5))
            assert (kind, end["finish_reason"]) == ("end", "length")


# --- refusing to start -----------------------------------------------------------------------------------------------


def _refusal(*args: str, home: Path) -> str:
    """The one line of a start that fails as it should."""
    with orchd_serve(*args, home=home) as process:
        code = process.wait()
    assert (code, process.stdout) == (2, ""), process.stderr
    lines = process.stderr.splitlines()
    assert len(lines) == 1, process.stderr
    assert "Traceback" not in lines[0]
    return lines[0]


def test_a_port_in_use_is_one_line(tiny_model_path: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        line = _refusal("--model", str(tiny_model_path), "--port", port, home=tmp_path)
    assert f"127.0.0.1:{port}" in line
    assert "--port" in line


NOT_MODELS = {
    "not a GGUF": (b"this is text, and long enough for a header", "not a GGUF file"),
    "empty": (b"", "empty"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
}


@pytest.mark.parametrize(("content", "why"), NOT_MODELS.values(), ids=NOT_MODELS)
def test_a_file_that_is_no_model_is_one_line(tmp_path: Path, content: bytes, why: str) -> None:
    (tmp_path / "bad.gguf").write_bytes(content)
    line = _refusal("--model", "bad.gguf", "--port", "0", home=tmp_path)
    assert why in line
    assert "bad.gguf" in line


def test_a_model_that_does_not_load_is_told_after_its_warnings(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF\3\0\0\0" + b"\xff" * 64)
    with orchd_serve("--model", "bad.gguf", "--port", "0", home=tmp_path) as process:
        assert process.wait() == 2
    *others, line = process.stderr.splitlines()
    assert line.startswith('orchd: pool "default": bad.gguf ')
    assert all(" WARNING " in other for other in others)


def test_a_missing_model_is_one_line(tmp_path: Path) -> None:
    line = _refusal("--model", "missing.gguf", "--port", "0", home=tmp_path)
    assert "missing.gguf" in line


BAD_CONFIGS = {
    "unknown key": ("[server]\nprot = 1\n", "server.prot"),
    "two pools of one id": ('[[pools]]\nmodel = "a.gguf"\n[[pools]]\nmodel = "a.gguf"\n', "pools[1].id"),
    "a missing model": ('[[pools]]\nmodel = "./missing.gguf"\n', "missing.gguf"),
    "not TOML": ("port: 1\n", "TOML"),
}


@pytest.mark.parametrize(("text", "named"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_a_bad_configuration_is_one_line(tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / "bad.toml").write_text(text)
    line = _refusal("--config", "bad.toml", "--port", "0", home=tmp_path)
    assert named in line
    assert "bad.toml" in line or named == "missing.gguf"


def test_tasks_with_long_prompts_take_no_more_than_retained_bytes_once_they_have_ended(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    """They took 60 kB more each: the prompt, and its tokens."""
    config = tmp_path / "orchd.toml"
    config.write_text(
        f'[tasks]\nretained_bytes = {1 << 20}\n[[pools]]\nmodel = "{tiny_model_path}"\n'
        'devices = ["cpu"]\nslots = 1\nctx = 16384\nthreads = 1\n'
    )
    with orchd_serve("--config", str(config), "--port", "0", home=tmp_path) as process:
        port = process.wait_ready()
        prompt = "the " * 7500

        def run(count: int) -> None:
            for number in range(count):
                task_id = submit(port, prompt=prompt + str(number), max_tokens=1)
                assert list(follow(port, task_id))[-1][0] == "end"

        run(60)
        before = _resident_bytes(process.popen.pid)
        run(160)
        more = _resident_bytes(process.popen.pid) - before
        assert more < 4 << 20


def _resident_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) * 1024
