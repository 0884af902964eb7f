"""What `orchd --version` says of the engine, and `orchd check` of the build and the driver."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from engines.llamacpp import build
from orchd.machine import gpus


def engine_versions() -> Iterator[str]:
    """Lines about llama.cpp, read off files: loading the libraries takes a second or more."""
    try:
        yield f"llama-cpp-python {importlib.metadata.version('llama-cpp-python')}"
    except importlib.metadata.PackageNotFoundError:
        yield "llama-cpp-python is not installed; run 'make setup'"
        return
    yield f"llama.cpp {build.version() or 'of unknown version'} (ggml {build.version('ggml') or 'of unknown version'})"
    yield f"Backends {', '.join(build.backends())}"


def build_summary() -> str:
    """What the installed llama.cpp was built for."""
    backend = build.gpu_backend()
    architectures = built_architectures()
    of_gpus = f", compute capability {', '.join(architectures)}" if architectures else ""
    if backend:
        return f"built for {backend}{of_gpus}"
    return "built for the CPU" + (" of any machine" if build.is_portable() else "")


def built_architectures(environment: Path | None = None) -> tuple[str, ...]:
    """Compute capabilities that the installed llama.cpp was compiled for, such as ``("86", "89")``.

    Empty for a build for the CPU, and for one that this project's CMakeLists.txt did not install.

    Args:
        environment: Folder of the virtual environment; this process's own by default.
    """
    try:
        built = (environment or Path(sys.prefix)).joinpath(".orchd-wheel.txt").read_text()
    except OSError:
        return ()
    found = re.search(r"-DCMAKE_CUDA_ARCHITECTURES=(\S+)", built)
    return tuple(name.partition("-")[0] for name in found[1].split(";")) if found else ()  # 86-real is for 86


def driver_summary() -> str | None:
    """The NVIDIA driver; None where there is none."""
    driver = gpus.find_driver()
    return None if driver is None else f"NVIDIA {driver.version}, CUDA up to {driver.cuda_version or 'unknown'}"
