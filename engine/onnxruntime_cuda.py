"""Engines for ONNX Runtime's CUDA provider: typed graphs with fused attention and group norms, for any size."""

import gc
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import onnxruntime

from ..runtime.backends import BACKENDS
from ..runtime.format.build_options import BuildOptions, OnBuildProgress
from ..runtime.format.bundle import Bundle
from ..runtime.format.engine_keys import EngineIndex, EngineRecord, EngineSpec
from .check import check_precision
from .engine_writer import SetBuild, any_size_spec, engine_record, write_set
from .rewrites.attention import is_spatial_self_attention, is_temporal_attention
from .rewrites.multi_head_attention import fuse_multi_head_attention
from .rewrites.nhwc_group_norm import define_group_norms, fuse_nhwc_group_norms
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
        write_typed(typed_graph(bundle, graph, precision, fuse), path)
        gc.collect()  # reference cycles keep the graph's weights mapped: gigabytes
        errors = _check(bundle, graph, precision, path) if options.check and precision != "fp32" else {}
        gc.collect()
        weights = [file for file in (path.with_suffix(".weights"),) if file.exists()]
        return engine_record(path, spec(graph), {"errors": errors}, *weights)

    index = EngineIndex(backend=backend, precision=precision, engines={})
    return write_set(bundle, SetBuild(index, list(bundle.manifest.graphs), spec, make), options, on_progress)


def emulated_graphs(bundle: Bundle, precision: str) -> Callable[[str], ir.Model]:
    """Returns a function that makes the graph of an engine, given its name. See `engine.emulated_sessions`."""

    def make(graph: str) -> ir.Model:
        model = typed_graph(bundle, graph, precision, fuse)
        define_group_norms(model)
        return model

    return make


def _check(bundle: Bundle, graph: str, precision: str, path: Path) -> dict[str, float]:
    """`check_precision` of a graph whose group norms this computer cannot run as they are."""
    model = ir.load(path)
    define_group_norms(model)
    defined = path.with_suffix(".defined.onnx")
    try:
        ir.save(model, defined)  # shares the graph's weights
        return check_precision(bundle, graph, precision, defined)
    finally:
        defined.unlink(missing_ok=True)


def fuse(model: ir.Model) -> None:
    """Fuses group norms, and spatial and temporal self-attention. Attention to the text stays: its scores are small."""
    fuse_multi_head_attention(model, _is_self_attention)
    fuse_nhwc_group_norms(model)


def _is_self_attention(name: str) -> bool:
    return is_spatial_self_attention(name) or is_temporal_attention(name)
