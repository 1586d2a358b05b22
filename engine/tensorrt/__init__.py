"""Building TensorRT and TensorRT-RTX engines."""
