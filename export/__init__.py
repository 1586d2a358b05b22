"""Checkpoints in, a portable ONNX bundle out. Needs the `export` extra."""

from ..runtime.errors import SparseCtrlLcmError as SparseCtrlLcmError  # with it what is set ahead of ONNX Runtime
