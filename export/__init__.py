"""Checkpoints in, a portable ONNX bundle out. Needs the `export` extra."""
