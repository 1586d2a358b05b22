"""Portable ONNX graphs in, engines of a backend out."""

from .. import runtime as runtime  # ahead of ONNX Runtime, for which it sets the environment
