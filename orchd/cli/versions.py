"""What `orchd --version` says of the engine, and `orchd check` of the build and the driver."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator

from engines.llamacpp import build
from orchd.machine import devices


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
    architectures = devices.built_architectures()
    of_gpus = f", compute capability {', '.join(architectures)}" if architectures else ""
    if backend:
        return f"built for {backend}{of_gpus}"
    return "built for the CPU" + (" of any machine" if build.is_portable() else "")


def driver_summary() -> str | None:
    """The NVIDIA driver; None where there is none."""
    driver = devices.find_driver()
    return None if driver is None else f"NVIDIA {driver.version}, CUDA up to {driver.cuda_version or 'unknown'}"
