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
    names = {name.partition(".")[0].removeprefix("libggml-") for name in _libraries() if name.startswith("libggml-")}
    return sorted(_NAMES.get(name, name) for name in names - {"base"})


def version(library: str = "llama") -> str | None:
    """Of llama.cpp, or of its library ``ggml``, such as ``0.5.0``; None where a platform's files do not tell."""
    found = {name.partition(".so.")[2] for name in _libraries() if name.startswith(f"lib{library}.so.")}
    return max(found, key=len, default=None)


def _libraries() -> list[str]:
    spec = importlib.util.find_spec("llama_cpp")
    folders = spec.submodule_search_locations if spec is not None else None
    return [path.name for folder in folders or () for path in Path(folder, "lib").glob("lib*")]
