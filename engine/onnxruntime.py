"""Engines for ONNX Runtime on the CPU, with spatial self-attention fused into one operator.

The portable graph holds the full score matrix: 8.6 GB for one attention at 512x512 and 16 frames. MultiHeadAttention
computes it block by block.
"""

from pathlib import Path

import onnx_ir as ir
import onnxruntime

from ..runtime.format.build_options import BuildOptions, OnBuildProgress
from ..runtime.format.bundle import Bundle
from ..runtime.format.engine_keys import EngineIndex, EngineRecord, EngineSpec
from .engine_writer import SetBuild, any_size_spec, engine_record, write_set
from .rewrites.attention import is_spatial_self_attention, softmaxes
from .rewrites.multi_head_attention import fuse_multi_head_attention


def build(bundle: Bundle, backend: str, options: BuildOptions, on_progress: OnBuildProgress) -> EngineIndex:
    """Writes an engine for each graph with spatial self-attention, and the number of fused attentions in its report.

    The engines share the weights of the bundle.

    Raises:
        BackendError: the engines cannot be written.
    """

    def load(graph: str) -> ir.Model:
        return ir.load(bundle.folder / bundle.graph(graph).path)

    def spec(graph: str) -> EngineSpec:
        return any_size_spec(bundle, graph, backend, "fp32", onnxruntime.__version__)

    def make(graph: str, folder: Path, report: OnBuildProgress) -> EngineRecord:
        report("fusing attention", 0.0)
        model = load(graph)
        count = fuse_spatial_attention(model)
        ir.save(model, folder / f"{graph}.onnx")
        return engine_record(folder / f"{graph}.onnx", spec(graph), {"attention fused": count})

    index = EngineIndex(backend=backend, precision="fp32", engines={})
    graphs = [graph for graph in bundle.manifest.graphs if softmaxes(load(graph), is_spatial_self_attention)]
    return write_set(bundle, SetBuild(index, graphs, spec, make), options, on_progress)


def fuse_spatial_attention(model: ir.Model) -> int:
    """Replaces the self-attention of every spatial transformer with MultiHeadAttention; returns how many."""
    return fuse_multi_head_attention(model, is_spatial_self_attention)
