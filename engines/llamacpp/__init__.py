"""llama.cpp, driven through the low-level API of llama-cpp-python: continuous batching over slots of one context."""
