"""Bundles and engine sets on disk: the code that `export` and `engine` share with the runtime."""
