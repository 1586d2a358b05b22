"""Engines for ONNX Runtime on the CPU, with spatial self-attention fused into one operator.

The portable graph holds the full score matrix: 8.6 GB for one attention at 512x512 and 16 frames. MultiHeadAttention
computes it block by block.
"""

import onnx_ir as ir
import onnxruntime

from ..runtime.format.build_options import BuildOptions, OnBuildProgress
from ..runtime.format.bundle import Bundle
from ..runtime.format.engine_keys import EngineIndex
from .engine_writer import any_size_spec, engine_record, staged
from .rewrites.attention import is_spatial_self_attention
from .rewrites.multi_head_attention import fuse_multi_head_attention


def build(bundle: Bundle, backend: str, options: BuildOptions, on_progress: OnBuildProgress) -> EngineIndex:
    """Writes an engine for each graph with spatial self-attention, and the number of fused attentions in its report.

    The engines share the weights of the bundle.

    Raises:
        BackendError: the engines cannot be written.
    """
    index = EngineIndex(backend=backend, precision="fp32", engines={})
    with staged(bundle.folder, index) as folder:
        for name, record in bundle.manifest.graphs.items():
            model = ir.load(bundle.folder / record.path)
            count = fuse_spatial_attention(model)
            if not count:
                continue
            ir.save(model, folder / f"{name}.onnx")
            spec = any_size_spec(bundle, name, backend, "fp32", onnxruntime.__version__)
            index.engines[name] = engine_record(folder / f"{name}.onnx", spec, {"attention fused": count})
    return index


def fuse_spatial_attention(model: ir.Model) -> int:
    """Replaces the self-attention of every spatial transformer with MultiHeadAttention; returns how many."""
    return fuse_multi_head_attention(model, is_spatial_self_attention)
