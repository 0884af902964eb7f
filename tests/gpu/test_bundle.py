"""`make gpu-bundle` and what it takes along: what is refused, and in which words; what is in the archive."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import gguf
import pytest

from benchmarks.gpu.bundle import unpack
from benchmarks.gpu.bundle.unpack import Unfit
from testkit import synthetic_gguf
from tools import gpu_bundle

ROOT = Path(__file__).parents[2]
RUN = ROOT / "benchmarks" / "gpu" / "bundle" / "run.sh"
FACTS = {"backend": "CUDA", "cuda": "13.0.88", "architectures": ["90"], "machine": "x86_64", "glibc": "2.34"}


class Driver:
    """NVIDIA's driver as `unpack` asks it."""

    def __init__(
        self, *, code: int = 0, version: int = 13000, gpus: int = 1, capability: tuple[int, int] = (9, 0)
    ) -> None:
        self._code, self._version, self._gpus, self._capability = code, version, gpus, capability

    def cuInit(self, _: int) -> int:
        return self._code

    def cuDriverGetVersion(self, at: Any) -> None:
        at._obj.value = self._version

    def cuDeviceGetCount(self, at: Any) -> None:
        at._obj.value = self._gpus

    def cuDeviceGetAttribute(self, at: Any, which: int, _: int) -> None:
        at._obj.value = self._capability[which - 75]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """One that the bundle fits."""
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.39"))
    monkeypatch.setattr(unpack, "cpu_flags", lambda: {"avx2", "bmi2", "f16c", "fma", "sse2"})
    monkeypatch.setattr("ctypes.CDLL", lambda _: Driver())
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    return monkeypatch


def refusal(device: str = "gpu:0", **facts: object) -> str:
    with pytest.raises(Unfit) as refused:
        unpack.check_machine({**FACTS, **facts}, device)
    return str(refused.value)


# --- what run.sh says ------------------------------------------------------------------------------------------------


def test_a_machine_that_fits_passes(machine: pytest.MonkeyPatch) -> None:
    unpack.check_machine(FACTS, "gpu:0")
    unpack.check_machine(FACTS, "cpu")


def test_without_a_driver_it_says_what_is_missing_and_how_to_try_it(machine: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file: No such file or directory")

    machine.setattr("ctypes.CDLL", missing)
    assert refusal() == (
        "there is no NVIDIA driver here (libcuda.so.1 was not found); to try the bundle without a GPU: --device cpu"
    )
    unpack.check_machine(FACTS, "cpu")


@pytest.mark.parametrize(
    ("driver", "says"),
    [
        (Driver(code=100), "NVIDIA's driver is installed, but finds no GPU (cuInit answers 100)"),
        (Driver(version=12040), "the driver runs CUDA 12.4 at most, and the bundle needs CUDA 13: install driver 580"),
        (Driver(gpus=0), "there is no gpu:0; the driver shows 0 GPUs"),
        (
            Driver(capability=(8, 6)),
            "gpu:0 has compute capability 86, and the bundle was built for 90: make gpu-bundle",
        ),
    ],
)
def test_a_driver_or_card_that_does_not_fit_is_named(machine: pytest.MonkeyPatch, driver: Driver, says: str) -> None:
    machine.setattr("ctypes.CDLL", lambda _: driver)
    assert refusal().startswith(says)


def test_another_machine_libc_or_cpu_is_named(machine: pytest.MonkeyPatch) -> None:
    assert refusal(machine="aarch64") == "the bundle is for aarch64, and this machine is x86_64"
    assert refusal(glibc="2.40") == "the bundle needs glibc 2.40 or newer, and this machine has glibc 2.39"
    machine.setattr(unpack, "cpu_flags", lambda: {"sse2", "fma"})
    assert refusal() == "this machine's CPU lacks avx2, bmi2, f16c, which the bundle is compiled for"


def test_a_device_has_to_be_spelled_right_and_in_the_bundle(machine: pytest.MonkeyPatch) -> None:
    assert refusal("cuda:0") == "--device is 'cuda:0'; it has to be gpu:N, as nvidia-smi counts, or cpu"
    assert refusal(backend="CPU").startswith("the bundle was made for the CPU; try it with --device cpu")


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 2 * 10**9}))
    with pytest.raises(Unfit, match=r"has 2\.0 GB free, and 8\.0 GB are needed; name another disk with --home"):
        unpack.check_disk(tmp_path, "gpu:0")
    unpack.check_disk(tmp_path, "cpu")


@pytest.mark.parametrize("there", [[], ["python3"]])
def test_with_no_or_another_python_the_script_says_which_it_needs(tmp_path: Path, there: list[str]) -> None:
    for name in there:
        (tmp_path / name).write_text("#!/bin/sh\necho 3.10\n")
        (tmp_path / name).chmod(0o755)
    for tool in ("bash", "dirname"):
        (tmp_path / tool).symlink_to(Path("/usr/bin", tool))
    done = subprocess.run([RUN], env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    found = "python3 is 3.10" if there else "there is no Python at all"
    assert done.stderr.startswith(f"run.sh: Python 3.12 was not found ({found}); install it, or name it: ORCHD_PYTHON=")


def test_a_model_that_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(unpack, "HERE", tmp_path)
    (tmp_path / "bundle.json").write_text(json.dumps(FACTS))
    assert unpack.main(["--device", "cpu", "--model", "no.gguf", "--home", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "run.sh: there is no file no.gguf\n"


# --- cuBLAS ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "env/lib/python3.12/site-packages/nvidia/cu13/lib").mkdir(parents=True)
    return tmp_path


def placed(home: Path) -> Path:
    return home / "env/lib/python3.12/site-packages/nvidia/cu13/lib/libcublas.so.13"


def test_the_machine_s_cublas_is_used_where_there_is_one(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = home / "own"
    own.mkdir()
    (own / "libcublas.so.13").touch()
    monkeypatch.setattr(unpack, "cublas_folders", lambda: iter([home / "none", own]))
    assert unpack.place_cublas(home).startswith("the bundle's stand-in")  # without its second library it does not load
    (own / "libcublasLt.so.13").touch()
    assert unpack.place_cublas(home) == f"cuBLAS of this machine, {own}"
    assert placed(home).readlink() == own / "libcublas.so.13"


def test_without_one_it_is_the_stand_in(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpack, "cublas_folders", lambda: iter([]))
    assert "stand-in" in unpack.place_cublas(home)
    assert placed(home).readlink() == home / "content/cublas/libcublas.so.13"


def test_the_bundle_s_own_comes_first(home: Path) -> None:
    placed(home).touch()
    assert unpack.place_cublas(home) == "cuBLAS of the bundle"


def test_the_stand_in_has_every_function_that_llama_cpp_calls() -> None:
    code = gpu_bundle.STAND_IN.read_text()
    for name in (
        "Create_v2", "Destroy_v2", "SetStream_v2", "SetMathMode", "SetWorkspace_v2", "GetStatusString", "Sgemm_v2",
        "GemmEx", "GemmStridedBatchedEx", "GemmBatchedEx", "SgemmStridedBatched", "SgemmBatched", "StrsmBatched",
    ):  # fmt: skip
        assert f"cublas{name}(" in code


# --- making it -------------------------------------------------------------------------------------------------------


def settings(**other: str) -> dict[str, str]:
    args = "-DGGML_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=86-real;120a-real"
    return {"LLAMA_VERSION": "0.3.36", "LLAMA_ARGS": args, "WHEEL_KEY_TEXT": "x\nCUDA 13.0.88\ny", **other}


def test_what_the_machine_must_have_comes_from_cmake_s_decisions() -> None:
    facts = gpu_bundle.facts_of(settings(), "x86_64", "2.34")
    assert (facts["backend"], facts["cuda"], facts["architectures"]) == ("CUDA", "13.0.88", ["86", "120"])
    facts = gpu_bundle.facts_of(settings(LLAMA_ARGS="", WHEEL_KEY_TEXT="CUDA "), "x86_64", "2.34")
    assert (facts["backend"], facts["architectures"]) == ("CPU", [])


def test_the_glibc_it_needs_is_the_newest_that_a_library_asks_for(tmp_path: Path) -> None:
    library = tmp_path / "lib.so"
    library.write_bytes(b"\0GLIBC_2.4\0GLIBC_2.34\0GLIBCXX_3.4.30\0GLIBC_2.9\0")
    assert gpu_bundle.newest_glibc([library]) == "2.34"


def test_a_wheel_packed_anew_has_the_same_files_without_compression(tmp_path: Path) -> None:
    wheel, folder = tmp_path / "a.whl", tmp_path / "stored"
    folder.mkdir()
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("a/b.py", "x" * 1000)
    gpu_bundle.store(wheel, folder)
    with zipfile.ZipFile(folder / "a.whl") as stored:
        (entry,) = stored.infolist()
        assert (entry.compress_type, stored.read(entry)) == (zipfile.ZIP_STORED, b"x" * 1000)


def test_programs_come_without_the_libraries_that_the_wheel_has(tmp_path: Path) -> None:
    peer = tmp_path / "peer"
    peer.mkdir()
    for name in ("llama-server", "llama-bench", "libllama-server-impl.so", "libllama-common.so.0.5.0", "libggml.so.0"):
        (peer / name).touch()
    for link in ("libllama-common.so.0", "libllama-common.so"):
        (peer / link).symlink_to("libllama-common.so.0.5.0")
    gpu_bundle.copy_programs(peer, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"llama-server", "llama-bench", "libllama-server-impl.so", "libllama-common.so.0"}
    (peer / "llama-bench").unlink()
    with pytest.raises(gpu_bundle.NotMade, match="there is no llama-bench in"):
        gpu_bundle.copy_programs(peer, tmp_path / "again")


def test_a_build_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--build", str(tmp_path), "--peer", str(tmp_path), "--out", str(tmp_path / "out")]
    assert gpu_bundle.main(arguments) == 2
    assert "settings.cmake; run: make gpu-bundle" in capsys.readouterr().err


def test_a_folder_that_is_too_large_says_what_to_leave_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def collect(content: Path, *_: object, **__: object) -> dict[str, object]:
        content.mkdir()
        (content / "one").write_bytes(bytes(range(256)) * 10)
        return dict(FACTS)

    monkeypatch.setattr(gpu_bundle, "collect", collect)
    monkeypatch.setattr(gpu_bundle, "settings_of", lambda _: {})
    arguments = ["--build", "b", "--peer", "p", "--out", str(tmp_path / "out"), "--limit-mib"]
    assert gpu_bundle.main([*arguments, "0.001"]) == 1
    assert "name fewer compute capabilities, or allow more" in " ".join(capsys.readouterr().err.split())
    assert gpu_bundle.main([*arguments, "60"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.txt", "bundle.json", "orchd.tar.xz", "run.sh", "unpack.py",
    ]  # fmt: skip
    with tarfile.open(tmp_path / "out" / "orchd.tar.xz") as tar:
        assert tar.getnames() == ["one"]


def test_the_source_in_it_is_enough_for_the_tests_and_the_benchmarks(tmp_path: Path) -> None:
    for name in gpu_bundle.tracked(gpu_bundle.SOURCE):
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    environ = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path), "HOME": str(tmp_path)}

    def run(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=tmp_path, env=environ, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "test_it_loads_on_the_device" in run("pytest", "--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider")
    assert "b-speed-135M" in run("benchmarks.gpu.campaign", "--list", "--device", "cpu")
    for module in ("benchmarks.gpu", "benchmarks.compare", "benchmarks.gpu.choices", "benchmarks.gpu.models"):
        run(module, "--help")


def test_models_can_be_written_from_a_vocabulary_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = synthetic_gguf.write_vocabulary(tmp_path / "vocabulary.gguf")
    assert vocabulary.stat().st_size < 2 * 2**20
    shape = synthetic_gguf.Shape(layers=1, width=64, heads=2, kv_heads=1, ff=64)
    monkeypatch.setenv("ORCHD_TEST_VOCABULARY", str(vocabulary))
    monkeypatch.setattr(synthetic_gguf, "demo_model_path", lambda: None)
    path = synthetic_gguf.write(tmp_path / "m.gguf", shape, gguf.GGMLQuantizationType.Q4_0)
    tokens = gguf.GGUFReader(path).fields["tokenizer.ggml.tokens"]
    assert len(tokens.data) == len(gguf.GGUFReader(vocabulary).fields["tokenizer.ggml.tokens"].data)
