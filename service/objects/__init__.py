"""Stored objects: uploaded files and finished clips, and the object stores that hold their bytes."""
