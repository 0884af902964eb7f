"""`orchd check`: what it finds out about a configuration and this machine, and the exit code."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner, Result

from orchd.cli import versions
from orchd.cli.commands import check as check_command
from orchd.cli.commands import serve as serve_command
from orchd.cli.group import app
from orchd.machine import gpus, memory
from orchd.machine.gpus import Gpu
from orchd.settings.running import RunningServer, announced
from testkit.tiny_gguf import write_tiny_llama

TOKEN = "a-token-for-tests-0123456789"


COMMANDS = {"check": check_command.app, "serve": serve_command.app}


@pytest.fixture(autouse=True)
def no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("CUDA_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(gpus, "find_gpus", list)


@pytest.fixture(autouse=True)
def a_free_port(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something may listen on the default one here."""
    monkeypatch.setenv("ORCHD_PORT", "0")


def check(*args: str) -> Result:
    return CliRunner().invoke(app, ["check", *args])


def as_json(*args: str) -> Any:
    return json.loads(check(*args, "--json").stdout)


def config(home: Path, text: str) -> None:
    (home / "orchd.toml").write_text(text)


def test_a_model_that_fits_is_0(tiny_model_path: Path) -> None:
    result = check("-m", str(tiny_model_path), "--device", "cpu", "--ctx", "256")
    assert result.exit_code == 0, result.stdout
    for fact in ("tiny-llama", str(tiny_model_path), "4 slots of 256 tokens", "fits", "ok: orchd serve can start"):
        assert fact in result.stdout


def test_it_looks_at_every_option_of_serve(tiny_model_path: Path) -> None:
    options = {name: {param.name for param in get_command(command).params} for name, command in COMMANDS.items()}
    assert options["check"] - {"as_json"} == options["serve"] - {"verbose"}
    result = check("-m", str(tiny_model_path), "--models-dir", "nowhere")
    assert result.exit_code == 1
    assert "nowhere is not a readable folder" in result.stdout


def test_it_makes_no_token_and_says_where_the_first_start_will(home: Path, tiny_model_path: Path) -> None:
    result = check("-m", str(tiny_model_path))
    assert "none yet; the first start creates one in" in result.stdout
    assert not (home / ".local").exists()


def test_as_json_it_is_one_object_with_numbers(tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHD_TOKEN", TOKEN)
    answer = as_json("-m", str(tiny_model_path), "--device", "cpu", "--device", "cpu")
    assert (answer["ok"], answer["token"], answer["problems"]) == (True, "ORCHD_TOKEN", [])
    [pool] = answer["pools"]
    assert pool["devices"] == ["cpu#0", "cpu#1"]
    assert pool["weights_bytes"] == tiny_model_path.stat().st_size
    [place] = answer["memory"]
    each = pool["weights_bytes"] + pool["cache_bytes"] + pool["buffers_bytes"]
    assert (place["place"], place["fits"]) == ("cpu", True)
    prompt_cache = pool["prompt_cache_bytes"]
    assert prompt_cache == 1024 << 20
    assert place["need_bytes"] == 2 * each + int(2 * each * memory.MARGIN_SHARE) + memory.MARGIN_BYTES + prompt_cache
    assert TOKEN not in json.dumps(answer)


def test_what_does_not_fit_is_1_and_says_what_to_change(tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda place: 2**20)
    result = check("-m", str(tiny_model_path))
    assert result.exit_code == 1
    assert "problem: cpu has 0.00 GiB free, but pool default needs" in result.stdout
    assert "fewer slots" in result.stdout


def test_pools_that_share_a_memory_are_added_up(
    home: Path, tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config(home, "".join(f'[[pools]]\nid = "{name}"\nmodel = "{tiny_model_path}"\nctx = 256\n' for name in "ab"))
    one = as_json()["memory"][0]["need_bytes"] // 2
    monkeypatch.setattr(memory, "free_bytes", lambda place: one + one // 2)
    result = check()
    assert result.exit_code == 1
    assert "pools a, b together need" in result.stdout


def test_every_problem_is_listed_not_only_the_first(home: Path) -> None:
    (home / "bad.gguf").write_bytes(b"not a model")
    config(home, '[[pools]]\nid = "a"\nmodel = "bad.gguf"\n[[pools]]\nid = "b"\nmodel = "./none.gguf"\n')
    result = check()
    assert result.exit_code == 1
    assert 'problem: pool "a": bad.gguf is not a GGUF file' in result.stdout
    assert 'problem: pool "b": model' in result.stdout


def test_a_gpu_that_is_not_there_is_a_problem(tiny_model_path: Path) -> None:
    result = check("-m", str(tiny_model_path), "--device", "gpu:3")
    assert result.exit_code == 1
    assert "there is no gpu:3" in result.stdout


def test_gpus_are_listed_and_measured(tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(0, "GPU-8f5e0000-0000-0000-0000-000000000000", "NVIDIA Test", 8 * 2**30)
    monkeypatch.setattr(gpus, "find_gpus", lambda: [gpu])
    monkeypatch.setattr("engines.llamacpp.build.gpu_backend", lambda: "CUDA")
    monkeypatch.setattr(memory, "free_bytes", lambda place: {"gpu:0": 6 * 2**30, "cpu": 2 * 2**30}[place])
    result = check("-m", str(tiny_model_path))
    assert result.exit_code == 0
    assert "gpu:0 NVIDIA Test, 6.00 GiB of 8.00 GiB free, GPU-8f5e" in " ".join(result.stdout.split())
    assert as_json("-m", str(tiny_model_path))["pools"][0]["devices"] == ["gpu:0"]


@pytest.mark.usefixtures("nvml")
def test_the_backend_and_the_driver_are_named(tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.llamacpp.build.backends", lambda: ["CPU", "Vulkan"])
    monkeypatch.setattr(versions, "built_architectures", lambda: ())
    monkeypatch.setattr(gpus, "find_gpus", lambda: [Gpu(0, "GPU-1a2b", "NVIDIA GeForce GTX 1080", 8 * 2**30)])
    said = " ".join(check("-m", str(tiny_model_path), "--device", "gpu:0").stdout.split())
    assert "llama.cpp built for Vulkan driver NVIDIA 580.65.06, CUDA up to 13.0 gpu:0 NVIDIA GeForce GTX 1080" in said
    assert "devices gpu:0" in said


def test_what_llama_cpp_was_compiled_for_is_read_from_what_its_installation_left(tmp_path: Path) -> None:
    assert versions.built_architectures(tmp_path) == ()
    left = tmp_path / ".orchd-wheel.txt"
    left.write_text("llama-cpp-python 0.3.36\nCMAKE_ARGS -DGGML_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=86;89 -DX=1\n")
    assert versions.built_architectures(tmp_path) == ("86", "89")
    left.write_text("CMAKE_ARGS -DCMAKE_CUDA_ARCHITECTURES=86-real;120a-real -DX=1\n")  # machine code alone
    assert versions.built_architectures(tmp_path) == ("86", "120a")
    left.write_text("llama-cpp-python 0.3.36\nCMAKE_ARGS -DLLAVA_BUILD=OFF\n")
    assert versions.built_architectures(tmp_path) == ()


def test_a_gpu_without_a_build_for_it_is_a_note(tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "find_gpus", lambda: [Gpu(0, "GPU-8f5e", "NVIDIA Test", 2**30)])
    monkeypatch.setattr("engines.llamacpp.build.gpu_backend", lambda: None)
    result = check("-m", str(tiny_model_path))
    assert result.exit_code == 0
    assert "note: there are GPUs, but llama.cpp was built for the CPU only" in result.stdout


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (None, "chat.gguf has no chat template"),
        (
            "{% nothing %}",
            "the model's chat template cannot be used; send prompt instead (Encountered unknown tag",
        ),
    ],
)
def test_a_model_whose_conversations_cannot_work_is_a_note(tmp_path: Path, template: str | None, why: str) -> None:
    model = write_tiny_llama(tmp_path / "chat.gguf", chat_template=template)
    answer = as_json("-m", str(model))
    assert answer["ok"]
    [note] = [note for note in answer["notes"] if "conversations" in note]
    assert note.startswith(f'pool "default": conversations will be refused, only prompts work: {why}')


def test_a_port_that_is_taken_is_a_problem_as_it_is_at_the_start(home: Path, tiny_model_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = check("-m", str(tiny_model_path), "--port", str(port))
    assert result.exit_code == 1
    assert f"problem: cannot listen on 127.0.0.1:{port} (Address already in use)" in result.stdout
    assert "ok:" not in result.stdout


def test_a_server_of_this_account_is_named(home: Path, tiny_model_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with announced(RunningServer(f"http://127.0.0.1:{port}", None, None)):
            answer = as_json("-m", str(tiny_model_path), "--port", str(port))
    assert not answer["ok"]
    [note] = [note for note in answer["notes"] if "runs at" in note]
    assert note.startswith(f"a server of this account runs at 127.0.0.1:{port}; the memory that it holds")


def test_a_host_that_is_not_this_machine_is_a_problem(tiny_model_path: Path) -> None:
    result = check("-m", str(tiny_model_path), "--host", "192.0.2.1", "--port", "0")
    assert result.exit_code == 1
    assert "problem: cannot listen on 192.0.2.1:0 (Cannot assign requested address)" in result.stdout


def test_a_token_that_cannot_be_made_is_a_problem(home: Path, tiny_model_path: Path) -> None:
    (home / ".local").write_text("in the way")
    result = check("-m", str(tiny_model_path))
    assert result.exit_code == 1
    assert f"problem: a token cannot be created in {home}/.local" in result.stdout


def test_a_context_that_takes_terabytes_is_refused_by_its_size(tiny_model_path: Path) -> None:
    """Not after a minute, in which tables of all its cells are made."""
    result = check("-m", str(tiny_model_path), "--slots", "256", "--ctx", str(1 << 24))
    assert result.exit_code == 1
    assert re.search(r"problem: cpu has [\d.]+ GiB free, but pool default needs [\d.]+ TiB", result.stdout)


def test_a_token_that_cannot_be_used_is_a_problem(tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHD_TOKEN", "short")
    result = check("-m", str(tiny_model_path))
    assert result.exit_code == 1
    assert "problem: the token from ORCHD_TOKEN is shorter than" in result.stdout


ELEVEN = """
[server]
prot = 1
port = "many"
max_body_bytes = 1
token = "secret and short"
[tasks]
retention_s = -1
[queue]
capacity = 0
[models]
roots = ["/nowhere/at/all"]
[qeue]
capacity = 5
[[pools]]
id = "a b"
slots = 0
model = "none-such.gguf"
devices = ["gpu:0", "tpu"]
"""


def test_all_mistakes_are_found_in_one_run_and_it_is_2(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config(home, ELEVEN)
    monkeypatch.delenv("ORCHD_PORT")
    monkeypatch.setenv("ORCHD_HOST", "")
    answer = as_json()
    problems = [problem.replace(f"{home}/orchd.toml: ", "") for problem in answer["problems"]]
    assert [problem.split(",")[0].split(";")[0] for problem in problems[:10]] == [
        "unknown key server.prot",
        "unknown key qeue",
        "server.port is 'many'",
        "server.max_body_bytes is 1",
        "tasks.retention_s is -1",
        "queue.capacity is 0",
        "pools[0].id is 'a b'",
        "pools[0].slots is 0",
        "pools[0].devices[1] is 'tpu'",
        "environment: ORCHD_HOST is ''",
    ]
    later = "\n".join(problems[10:])
    for found in ("models.roots: /nowhere/at/all", "none-such.gguf", "the token from server.token"):
        assert found in later
    assert "secret and short" not in json.dumps(answer)
    result = check()
    assert result.exit_code == 2
    assert result.stdout.count("problem: ") == len(problems)


def test_the_other_commands_name_the_first_mistake_and_count_the_others(home: Path) -> None:
    config(home, ELEVEN)
    result = CliRunner().invoke(app, ["serve"])
    assert result.exit_code == 2
    assert "did you mean server.port" in result.stderr
    assert "(and 8 more; 'orchd check' lists them all)" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_file_that_cannot_be_read_at_all_is_one_line_and_2(home: Path) -> None:
    config(home, "[server\n")
    result = check()
    assert result.exit_code == 2
    assert "not valid TOML" in result.stderr
    assert result.stdout == ""


def test_each_pool_with_a_device_that_is_not_there_is_named(home: Path, tiny_model_path: Path) -> None:
    config(
        home,
        "".join(
            f'[[pools]]\nid = "{name}"\nmodel = "{tiny_model_path}"\nctx = 256\ndevices = ["gpu:{index}"]\n'
            for index, name in enumerate("ab")
        ),
    )
    problems = as_json()["problems"]
    assert [problem.split(":")[0] for problem in problems] == ['pool "a"', 'pool "b"']


def test_llama_cpp_is_not_loaded(tiny_model_path: Path) -> None:
    code = "import sys, orchd.cli.check; sys.exit('llama_cpp' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    assert subprocess.run([sys.executable, "-c", code], env=env, check=False).returncode == 0
