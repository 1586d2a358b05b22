"""Compares a backend's engines with the portable graphs, on Polygraphy (extra `verify`)."""
