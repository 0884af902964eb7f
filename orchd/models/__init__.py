"""Models on disk: their files, their names, and which of them serve."""
