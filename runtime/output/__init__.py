"""Writes frames to files."""
