"""The machine's devices and memory, and their state."""
