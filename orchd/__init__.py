"""orchd: an inference server for GGUF models that owns its GPUs in-process."""

__version__ = "0.1.0"
