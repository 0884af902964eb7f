"""What the installed llama.cpp was built with, read from its files: nothing is loaded."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def has_cuda() -> bool:
    """Whether it has a CUDA backend. May be called before ``CUDA_VISIBLE_DEVICES`` is decided."""
    spec = importlib.util.find_spec("llama_cpp")
    folders = spec.submodule_search_locations if spec is not None else None
    return any((Path(folder) / "lib" / "libggml-cuda.so").exists() for folder in folders or ())
