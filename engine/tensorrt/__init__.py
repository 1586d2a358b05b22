"""Builds TensorRT and TensorRT-RTX engines."""
