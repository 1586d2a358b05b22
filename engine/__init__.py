"""Builds the engines of a backend from portable ONNX graphs."""
