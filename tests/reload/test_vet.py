"""Looking at a model file in a process that may die."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from engines.api import DeviceSpec, Footprint, ModelSpec
from engines.errors import LoadFailed
from engines.llamacpp import examination
from engines.llamacpp.examination import _sizes
from engines.llamacpp.model import LlamaModel
from engines.llamacpp.native.model import NativeModel
from engines.llamacpp.vet import vet
from testkit import damaged_gguf
from testkit.tiny_gguf import write_tiny_bert, write_tiny_llama, write_tiny_mamba, write_tiny_swa
from tests.reload.forked import forked


def refusal(path: Path, *, time_limit_s: float | None = None) -> str:
    with pytest.raises(LoadFailed) as caught:
        vet(ModelSpec(path, slots=2, ctx=256, batch=32), time_limit_s=time_limit_s)
    message = str(caught.value)
    assert str(path.parent) not in message
    assert message.isprintable()
    return message


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs instead of Python: a shell script, to be written by the test."""
    script = tmp_path / "bin" / "python"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    return script


# --- how the process may end


@pytest.mark.parametrize(
    ("ending", "message"),
    [
        ("kill -ABRT $$", "m.gguf is damaged: opening it crashes llama.cpp with SIGABRT"),
        ("kill -SEGV $$", "m.gguf is damaged: opening it crashes llama.cpp with SIGSEGV"),
        ("kill -KILL $$", "m.gguf could not be vetted: the process was killed, probably because memory ran out"),
        ("kill -XCPU $$", "m.gguf takes longer to open than any valid file"),
        ("exit 3", "m.gguf could not be vetted: the process exited with 3 and no output"),
        ("echo oops", "m.gguf could not be vetted: the process exited with 0 and no output"),
        ("""echo '{"ok": false, "error": "m.gguf is bad"}'""", "m.gguf is bad"),
    ],
)
def test_every_end_of_the_process_is_a_sentence(tmp_path: Path, stand_in: Path, ending: str, message: str) -> None:
    stand_in.write_text(f"#!/bin/sh\n{ending}\n")
    assert refusal(write_tiny_llama(tmp_path / "m.gguf")) == message


def test_a_model_that_ends_llama_cpp_only_with_several_slots_is_told_so(tmp_path: Path, stand_in: Path) -> None:
    answer = '{"ok": true, "cache": 1, "buffers": 2, "on_gpu": 0}'
    stand_in.write_text(f"#!/bin/sh\ncase $* in *'--slots 1 '*) echo '{answer}';; *) kill -ABRT $$;; esac\n")
    model = write_tiny_llama(tmp_path / "m.gguf")
    assert refusal(model) == (
        "m.gguf can only be served with slots = 1: llama.cpp ends where several of its tasks come and go"
    )
    assert vet(ModelSpec(model, slots=1)).cache == 1


def test_an_architecture_that_does_so_is_known_where_the_file_is_too_large_to_be_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PLaMo 2, whose models are large: one passed vetting and ended the server."""
    spec = ModelSpec(write_tiny_mamba(tmp_path / "m.gguf"), slots=3, ctx=256, batch=32)
    assert examination._examine(spec, decode=False)["cache"]
    monkeypatch.setattr(NativeModel, "architecture", "plamo2")
    with pytest.raises(LoadFailed, match="can only be served with up to 2 slots: llama"):
        examination._examine(spec, decode=False)
    assert examination._examine(replace(spec, slots=2), decode=False)["cache"]


def test_a_process_that_hangs_is_ended(tmp_path: Path, stand_in: Path) -> None:
    stand_in.write_text("#!/bin/sh\nexec sleep 60\n")
    began = time.monotonic()
    assert refusal(write_tiny_llama(tmp_path / "m.gguf"), time_limit_s=0.2) == "m.gguf could not be opened within 0 s"
    assert time.monotonic() - began < 10


def test_a_process_that_cannot_be_started_is_told(tmp_path: Path, stand_in: Path) -> None:
    stand_in.unlink()
    assert "no process could be started" in refusal(write_tiny_llama(tmp_path / "m.gguf"))


def test_the_process_knows_nothing_of_the_servers_secrets(
    tmp_path: Path, stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHD_TOKEN", "secret-1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-2")
    monkeypatch.setenv("LD_PRELOAD_X", "secret-3")
    stand_in.write_text(f'#!/bin/sh\n(env; pwd; echo "$@") > {tmp_path}/seen\nexit 1\n')
    refusal(write_tiny_llama(tmp_path / "m.gguf"))
    seen = (tmp_path / "seen").read_text()
    assert "secret" not in seen
    names = {line.partition("=")[0] for line in seen.splitlines() if "=" in line}
    assert names - {"PWD", "SHLVL", "_", "OLDPWD"} <= {
        *("PATH", "LD_LIBRARY_PATH", "LANG", "TMPDIR"),
        *("PYTHONPATH", "OPENBLAS_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "GGML_NO_BACKTRACE"),
        "GGML_DISABLE_VULKAN",
    }
    assert "CUDA_VISIBLE_DEVICES=\n" in seen
    assert "\n/\n" in seen, "modules of the folder that the server was started in are not imported"


def test_modules_are_found_where_the_server_finds_them_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('imported')")
    path = write_tiny_llama(tmp_path / "m.gguf")
    monkeypatch.chdir(tmp_path)
    assert vet(ModelSpec(Path("m.gguf"), slots=1, ctx=256)).weights == path.stat().st_size


def test_no_shell_sees_the_files_name(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "$(touch pwned); -x.gguf")
    assert vet(ModelSpec(path, slots=1, ctx=256)).weights == path.stat().st_size
    assert not list(tmp_path.glob("pwned"))


def test_what_is_no_file_never_reaches_the_process(tmp_path: Path, stand_in: Path) -> None:
    stand_in.write_text(f"#!/bin/sh\ntouch {tmp_path}/reached\n")
    os.mkfifo(tmp_path / "fifo.gguf")
    (tmp_path / "folder.gguf").mkdir()
    assert refusal(tmp_path / "fifo.gguf") == "fifo.gguf is not a regular file"
    assert refusal(tmp_path / "folder.gguf") == "folder.gguf is not a regular file"
    assert refusal(tmp_path / "nothing.gguf") == "nothing.gguf cannot be read (No such file or directory)"
    assert not (tmp_path / "reached").exists()


# --- what it finds


@pytest.mark.parametrize("swa_full", [True, False])
@pytest.mark.parametrize("write", [write_tiny_llama, write_tiny_swa, write_tiny_mamba])
def test_the_footprint_is_what_llama_cpp_then_takes(tmp_path: Path, write: object, swa_full: bool) -> None:
    path = write(tmp_path / "m.gguf")  # type: ignore[operator]
    spec = ModelSpec(path, slots=4, ctx=512, batch=64, swa_full=swa_full)
    found = vet(spec)
    model = LlamaModel(spec, DeviceSpec("cpu"))
    try:
        buffers = model._context.buffers
        taken = Footprint(path.stat().st_size, buffers.of("KV", "RS"), buffers.of("compute", "output"))
    finally:
        model.close()
    assert found.weights == taken.weights
    assert found.cache == pytest.approx(taken.cache, rel=0.02, abs=2e4)  # llama.cpp tells hundredths of a MiB
    assert found.buffers == pytest.approx(taken.buffers, rel=0.02, abs=2e4)


@pytest.mark.parametrize("swa_full", [True, False])
@pytest.mark.parametrize("write", [write_tiny_llama, write_tiny_swa, write_tiny_mamba])
def test_what_many_cells_take_follows_from_fewer(
    tmp_path: Path, write: object, swa_full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "m.gguf")  # type: ignore[operator]
    spec = ModelSpec(path, slots=4, ctx=16384, batch=64, swa_full=swa_full)
    model = NativeModel(path, no_alloc=True)
    try:
        exactly = _sizes(model, spec)
        monkeypatch.setattr("engines.llamacpp.examination._MOST_CELLS", 4 * 4096)
        cache, buffers, on_gpu = _sizes(model, spec)
    finally:
        model.close()
    assert cache == pytest.approx(exactly[0], rel=0.02, abs=2e5)  # llama.cpp tells hundredths of a MiB
    assert buffers == pytest.approx(exactly[1], rel=0.1, abs=2e5)
    assert on_gpu == pytest.approx(exactly[2], rel=0.1, abs=2e5)


def test_a_shape_of_terabytes_is_measured_in_seconds(tiny_model_path: Path) -> None:
    assert vet(ModelSpec(tiny_model_path, slots=256, ctx=1 << 24), time_limit_s=30).cache >= 2**40


def test_an_embedding_model_does_not_generate(tmp_path: Path) -> None:
    assert "does not generate text" in refusal(write_tiny_bert(tmp_path / "bert.gguf"))


def test_a_model_that_computes_nan_is_found_by_its_first_token(tmp_path: Path) -> None:
    assert "NaN" in refusal(write_tiny_llama(tmp_path / "nan.gguf", nan_weights=True))


def test_of_a_large_file_only_the_structure_is_looked_at(tmp_path: Path) -> None:
    """Such a one is said to be large here; its NaN shows that no token was decoded."""
    path = write_tiny_llama(tmp_path / "nan.gguf", nan_weights=True)
    program = (
        "import sys; from engines.llamacpp import examination; examination.DECODE_UP_TO = 1000; "
        f"sys.argv = ['vet', {str(path)!r}, '--slots', '2', '--ctx', '512']; sys.exit(examination.main())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    answer = json.loads(done.stdout)
    assert answer["ok"]
    assert answer["cache"] > 0


def test_a_vocabulary_on_which_a_prompt_would_end_the_server(tmp_path: Path) -> None:
    """llama.cpp loads it, and throws once a prompt holds a character that needs the missing byte."""
    good = write_tiny_llama(tmp_path / "good.gguf").read_bytes()
    assert good.count(b"<0xE6>") == 1
    path = tmp_path / "no-byte.gguf"
    path.write_bytes(good.replace(b"<0xE6>", b"<0xG6>"))
    assert refusal(path) == "no-byte.gguf is damaged: opening it crashes llama.cpp with SIGABRT"


# --- the corpus


def test_whatever_is_wrong_with_a_file_it_is_refused_or_can_be_served(tmp_path: Path) -> None:
    """All 280 damaged files, by forks of one process instead of a new Python each (see `forked`).

    What passes is then served in a process of its own: nothing that vetting lets through may end the server.
    """
    good = write_tiny_llama(tmp_path / "tiny.gguf").read_bytes()
    folder = tmp_path / "damaged"
    folder.mkdir()
    for name, data in damaged_gguf.corpus(good):
        (folder / f"{name}.gguf").write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-m", "tests.reload.forked", str(folder)], stdout=subprocess.PIPE, check=True, timeout=100
    )
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == len(list(folder.iterdir())) > 270
    passed = 0
    for name, code, answer, served, said in results:
        assert code == 0 or code in (-6, -7, -8, -11), f"{name}: {code} {said}"  # nothing hung, nothing was unexpected
        if code == 0 and answer["ok"]:
            passed += 1
            assert name.startswith("flipped-"), f"{name} passed"
            assert served == 0, f"{name} passed, and then ended its server with {served}: {said}"
        elif code == 0:
            assert answer["error"]
    assert 10 < passed < 100


def test_the_harness_sees_a_death(tmp_path: Path) -> None:
    assert forked(lambda path: os.kill(os.getpid(), 9), tmp_path)[0] == -9
