"""Measurements for a GPU; see docs/gpu.md."""
