"""A llama.cpp for other machines: how it is configured, how it is loaded, and what a build shows meanwhile."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engines.llamacpp import build

ROOT = Path(__file__).parents[2]
CMAKE = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}") or "cmake"
PROJECT = f"""\
cmake_minimum_required(VERSION 3.21)
project(decision LANGUAGES NONE)
include({ROOT}/cmake/portable.cmake)
orchd_portable(args exclude)
message(NOTICE "args=${{args}}\\nexclude=${{exclude}}")
"""


def configured(folder: Path, **options: str) -> subprocess.CompletedProcess[str]:
    (folder / "CMakeLists.txt").write_text(PROJECT)
    given = [f"-D{name}={value}" for name, value in options.items()]
    command = [CMAKE, "-S", str(folder), "-B", str(folder / "out"), *given]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(("version", "left_out"), [("12.2.0", True), ("14.2.0", False)])
def test_every_kind_of_cpu_but_those_that_the_compiler_gets_wrong(tmp_path: Path, version: str, left_out: bool) -> None:
    done = configured(tmp_path, ORCHD_BACKEND="cpu", CMAKE_CXX_COMPILER_ID="GNU", CMAKE_CXX_COMPILER_VERSION=version)
    assert done.returncode == 0, done.stderr
    assert "-DGGML_BACKEND_DL=ON -DGGML_CPU_ALL_VARIANTS=ON" in done.stderr
    assert "-DGGML_NATIVE=OFF" in done.stderr
    assert ("libggml-cpu-sapphirerapids.so" in done.stderr) is left_out


def test_a_portable_build_is_for_the_cpu(tmp_path: Path) -> None:
    done = configured(tmp_path, ORCHD_BACKEND="auto")
    assert done.returncode != 0
    assert "set -DORCHD_BACKEND=cpu" in done.stderr


def test_a_build_with_a_library_for_each_kind_of_cpu_has_one_backend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["libggml.so", "libggml-base.so.0", "libggml-cpu-haswell.so", "libggml-cpu-x64.so", "libllama.so"]
    monkeypatch.setattr(build, "_library_files", lambda: [tmp_path / name for name in names])
    assert build.backends() == ["CPU"]
    assert build.is_portable()


def test_ggml_is_told_where_its_backends_are_before_it_looks_elsewhere() -> None:
    """By itself it would load what lies in the working folder."""
    code = (
        "import ctypes, pathlib, llama_cpp\n"
        "told = []\n"
        "lib = pathlib.Path(llama_cpp.__file__).parent / 'lib'\n"
        "pathlib.Path.glob = lambda self, what: iter([lib / 'libggml-cpu-x64.so'] if 'cpu-' in what else [])\n"
        "class Fake:\n"
        "    def __init__(self, name, mode=0): self.name = name\n"
        "    def ggml_backend_load_all_from_path(self, folder): told.append((self.name, folder))\n"
        "begin = llama_cpp.llama_backend_init\n"
        "llama_cpp.llama_backend_init = lambda: (told.append('init'), begin())\n"
        "ctypes.CDLL, real = Fake, ctypes.CDLL\n"
        "import engines.llamacpp.native.library\n"
        "assert told == [('libggml.so.0', str(lib).encode()), 'init'], told\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


LOG = [
    "noise\n",
    "  [1/4 10.0 s] Building a\n",
    "  [2/4 20.5 s] Building b\n",
    "x.cpp:1: error: no\n",
    "  [4/4 300 s] x\n",
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(out: io.StringIO) -> str:
    sys.path.insert(0, str(ROOT / "cmake"))
    try:
        import progress  # type: ignore[import-not-found]  # a script beside the CMake files that run it
    finally:
        sys.path.pop(0)
    progress.show(LOG, out)
    return out.getvalue()


def test_a_terminal_sees_one_line_with_count_and_time_left() -> None:
    begin, error, end = shown(Terminal()).split("\n")[:3]
    assert begin.split("\r\x1b[K") == ["", "  1 of 4 steps, about 30 s left", "  2 of 4 steps, about 20 s left"]
    assert error == "x.cpp:1: error: no"
    assert end == "\r\x1b[K  4 of 4 steps, done in 5 min"


def test_a_pipe_gets_plain_lines() -> None:
    assert shown(io.StringIO()).splitlines() == [
        "  1 of 4 steps, about 30 s left",
        "  2 of 4 steps, about 20 s left",
        "x.cpp:1: error: no",
        "  4 of 4 steps, done in 5 min",
    ]
