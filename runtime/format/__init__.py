"""Bundles and engine sets on disk: all that export and engine share with the runtime."""
