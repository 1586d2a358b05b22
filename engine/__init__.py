"""Portable ONNX graphs in, engines of a backend out."""
