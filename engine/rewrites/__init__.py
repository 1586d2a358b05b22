"""Rewrites of ONNX graphs, one idea a file."""
