"""The `engines.api.Engine` of llama.cpp."""

from __future__ import annotations

from pathlib import Path

from engines.api import DeviceSpec, Footprint, ModelSpec, ProgressCallback, WaitCallback
from engines.llamacpp.model import LlamaModel
from engines.llamacpp.native import library
from engines.llamacpp.vet import vet
from engines.llamacpp.vocab import LlamaVocab


class LlamaCppEngine:
    """Stateless. Importing this module loads llama.cpp, which reads ``CUDA_VISIBLE_DEVICES`` then and never again."""

    name = "llamacpp"
    version = library.version

    def vet(self, spec: ModelSpec, *, on_wait: WaitCallback | None = None) -> Footprint:
        """See `engines.api.Engine`."""
        return vet(spec, on_wait=on_wait)

    def load_vocab(self, path: Path) -> LlamaVocab:
        """See `engines.api.Engine`."""
        return LlamaVocab(path)

    def load(self, spec: ModelSpec, device: DeviceSpec, *, on_progress: ProgressCallback | None = None) -> LlamaModel:
        """See `engines.api.Engine`."""
        return LlamaModel(spec, device, on_progress=on_progress)
