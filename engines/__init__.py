"""Inference engines. Nothing here knows about HTTP, queues or orchd, so other programs can use this package alone."""
