"""Requests from a file to clips in a folder, in a way that can be stopped at any moment and resumed."""
