"""What the installed llama.cpp was built with, read from its files: nothing is loaded."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_NAMES = {"cpu": "CPU", "cuda": "CUDA", "vulkan": "Vulkan"}


def gpu_backend() -> str | None:
    """How it computes on GPUs: ``CUDA`` or ``Vulkan``; None if it cannot. Is known before GPUs are chosen."""
    return next((name for name in ("CUDA", "Vulkan") if name in backends()), None)


def backends() -> list[str]:
    """What it can compute on, such as ``["CPU", "CUDA"]``; nothing where it is not installed."""
    names = {name.split(".")[0].split("-")[1] for name in _libraries() if name.startswith("libggml-")}
    return sorted(_NAMES.get(name, name) for name in names - {"base"})


def is_portable() -> bool:
    """Whether it has the CPU backend once for each kind of CPU, of which one is chosen when it starts."""
    return any(name.startswith("libggml-cpu-") for name in _libraries())


def version(library: str = "llama") -> str | None:
    """Of llama.cpp, or of its library ``ggml``, such as ``0.5.0``; None where a platform's files do not tell."""
    found = {name.partition(".so.")[2] for name in _libraries() if name.startswith(f"lib{library}.so.")}
    return max(found, key=len, default=None)


def identity() -> list[tuple[str, int, int]]:
    """What differs in every build: name, size and time of llama.cpp's libraries and of the code that uses them."""
    files = [*_library_files(), *Path(__file__).parent.rglob("*.py")]
    return sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files)


def _libraries() -> list[str]:
    return [path.name for path in _library_files()]


def _library_files() -> list[Path]:
    spec = importlib.util.find_spec("llama_cpp")
    folders = spec.submodule_search_locations if spec is not None else None
    return [path for folder in folders or () for path in Path(folder, "lib").glob("lib*")]
