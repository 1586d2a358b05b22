"""The loop in the host's memory, and the backends that run it."""
