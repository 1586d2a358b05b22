"""Checkpoints in, a portable ONNX bundle out. Needs the `export` extra."""

from .. import runtime as runtime  # ahead of ONNX Runtime, for which it sets the environment
