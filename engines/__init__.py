"""Inference engines. Nothing here knows about HTTP, queues or orchd: lift the package out and use it elsewhere."""
