"""Fusions into standard operators of ONNX, which ONNX Runtime runs."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
from fakes.gpu_emulation import open_session
from sparsectrl_lcm.engine.rewrites.attention import fuse_attention, is_transformer_attention
from sparsectrl_lcm.engine.rewrites.group_norm import fuse_group_norm


def run(path: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    return open_session(path).run(None, feeds)


def fuse_in_standard_operators(model: ir.Model) -> None:
    """Fuses as for TensorRT, but without TensorRT's own attribute, which ONNX Runtime refuses."""
    fuse_transformer_attention(model)
    fuse_group_norm(model)


def fuse_transformer_attention(model: ir.Model) -> None:
    fuse_attention(model, is_transformer_attention)
