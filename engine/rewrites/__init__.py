"""Rewrites of ONNX graphs, one idea per file."""
