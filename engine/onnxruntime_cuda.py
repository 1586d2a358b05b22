"""Engines for ONNX Runtime's CUDA provider: typed graphs with fused attention, for any size."""

import gc
from pathlib import Path

import onnx_ir as ir
import onnxruntime

from ..runtime.backends import BACKENDS
from ..runtime.format.build_options import BuildOptions, OnBuildProgress
from ..runtime.format.bundle import Bundle
from ..runtime.format.engine_keys import EngineIndex, EngineRecord, EngineSpec
from .check import check_precision
from .engine_writer import SetBuild, any_size_spec, engine_record, write_set
from .onnxruntime import fuse_multi_head_attention
from .rewrites.attention import is_spatial_self_attention, is_temporal_attention
from .rewrites.typed_graph import typed_graph, write_typed


def build(bundle: Bundle, backend: str, options: BuildOptions, on_progress: OnBuildProgress) -> EngineIndex:
    """Writes a typed graph with its weights for each graph of the bundle; needs no GPU.

    Raises:
        BackendError: a graph overflows in the precision, or the engines cannot be written.
    """
    precision = options.precision or BACKENDS[backend].precisions[0]

    def spec(graph: str) -> EngineSpec:
        return any_size_spec(bundle, graph, backend, precision, onnxruntime.__version__)

    def make(graph: str, folder: Path, report: OnBuildProgress) -> EngineRecord:
        report("writing", 0.0)
        path = folder / f"{graph}.onnx"
        write_typed(typed_graph(bundle, graph, precision, _fuse), path)
        gc.collect()  # reference cycles keep the graph's weights mapped: gigabytes
        check = options.check and precision != "fp32"
        errors = check_precision(bundle, graph, precision, path) if check else {}
        gc.collect()
        weights = [file for file in (path.with_suffix(".weights"),) if file.exists()]
        return engine_record(path, spec(graph), {"errors": errors}, *weights)

    index = EngineIndex(backend=backend, precision=precision, engines={})
    return write_set(bundle, SetBuild(index, list(bundle.manifest.graphs), spec, make), options, on_progress)


def _fuse(model: ir.Model) -> None:
    """Fuses spatial and temporal self-attention. Attention to the text stays: its scores are small."""
    fuse_multi_head_attention(model, _is_self_attention)


def _is_self_attention(name: str) -> bool:
    return is_spatial_self_attention(name) or is_temporal_attention(name)
