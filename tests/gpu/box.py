"""How CMake decides what llama.cpp is built for, on machines that a test makes up."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
CMAKE = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}") or "cmake"

PROJECT = f"""\
cmake_minimum_required(VERSION 3.21)
project(decision LANGUAGES NONE)
include({ROOT}/cmake/backend.cmake)
orchd_choose_backend(name args key)
message(NOTICE "name=${{name}}\\nargs=${{args}}\\nkey=${{key}}\\ndir=${{ORCHD_CUDA_DIR}}\\n\
compiler=${{ORCHD_CUDA_COMPILER}}\\nruntime=${{ORCHD_CUDA_RUNTIME}}\\n.")
"""
HERMETIC = {"ORCHD_BACKEND": "auto", "CMAKE_FIND_USE_CMAKE_SYSTEM_PATH": "OFF"}
"""Nothing is found but what is on PATH."""


@dataclass
class Box:
    """A machine as CMake sees it: nothing but what the test puts on PATH."""

    folder: Path
    environ: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        (self.folder / "bin").mkdir()
        (self.folder / "source").mkdir()
        (self.folder / "source" / "CMakeLists.txt").write_text(PROJECT)
        for tool in ("sh", "cat", "uname", "ninja", "make"):
            if (there := shutil.which(tool)) is not None:
                (self.folder / "bin" / tool).symlink_to(there)

    def program(self, name: str, body: str, *, where: str = "bin") -> Path:
        path = self.folder / where / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
        return path

    def nvidia_smi(self, answer: str, code: int = 0) -> None:
        self.program("nvidia-smi", f"cat <<END\n{answer}\nEND\nexit {code}")

    def gcc(self, version: str, name: str = "g++") -> Path:
        return self.program(name, f"echo {version}")

    def toolkit(self, version: str, *, libraries: tuple[str, ...], architectures: str, newest_gcc: int) -> Path:
        home = self.folder / "toolkit"
        nvcc = f"""case "$*" in
*--version*) echo "Cuda compilation tools, release {version.rpartition(".")[0]}, V{version}" ;;
*--list-gpu-arch*) for a in {architectures}; do echo compute_$a; done ;;
*) echo "#$ TOP={home}/bin/.." >&2 ;;
esac"""
        self.program("nvcc", nvcc, where="toolkit/bin")
        (home / "include" / "crt").mkdir(parents=True)
        (home / "include" / "cuda_runtime.h").touch()
        (home / "include" / "crt" / "host_config.h").write_text(f"#if __GNUC__ > {newest_gcc}\n")
        (home / "lib64" / "stubs").mkdir(parents=True)
        for library in libraries:
            (home / "lib64" / ("stubs" if library == "cuda" else "") / f"lib{library}.so").touch()
        self.environ["CUDA_HOME"] = str(home)
        return home

    def decide(self, **options: str) -> str:
        """What the configure step prints."""
        given = [f"-D{name}={value}" for name, value in {**HERMETIC, **options}.items()]
        done = subprocess.run(
            [CMAKE, "-S", self.folder / "source", "-B", self.folder / "build", "-G", "Unix Makefiles", *given],
            env={"PATH": str(self.folder / "bin"), "HOME": str(self.folder), **self.environ},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return done.stdout + done.stderr

    def says(self, **options: str) -> str:
        """The same on one line: CMake breaks messages as it likes."""
        return " ".join(self.decide(**options).split())

    def decided(self, **options: str) -> dict[str, str]:
        found = re.findall(r"^(\w+)=(.*)$", self.decide(**options), re.MULTILINE)
        return dict(found)
