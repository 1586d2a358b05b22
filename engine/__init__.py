"""Portable ONNX graphs in, engines of a backend out."""

from ..runtime.errors import SparseCtrlLcmError as SparseCtrlLcmError  # with it what is set ahead of ONNX Runtime
