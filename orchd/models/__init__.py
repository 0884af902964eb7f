"""Models on disk: which files, which names, which of them serve."""
