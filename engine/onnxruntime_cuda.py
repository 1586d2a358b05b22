"""Engines for ONNX Runtime's CUDA provider: typed graphs with fused attention, for any size."""

import gc
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import onnxruntime

from ..runtime.errors import InvalidRequest
from ..runtime.format.bundle import Bundle
from ..runtime.format.engine_sets import EngineIndex
from .check import check_precision
from .engine_writer import any_size_spec, engine_record, staged
from .onnxruntime import fuse_multi_head_attention
from .rewrites.attention import is_spatial_self_attention, is_temporal_attention
from .rewrites.typed_graph import typed_graph, write_typed

BACKEND = "onnxruntime-cuda"
PRECISIONS = ("fp16", "fp32")


def build(
    bundle: Path,
    precision: str = "fp16",
    on_progress: Callable[[str, float], None] = lambda text, fraction: None,
    check: bool = True,
) -> EngineIndex:
    """Writes a typed graph for each of the bundle's, with its weights; needs no GPU.

    Raises:
        BundleError: `bundle` is not a bundle.
        InvalidRequest: the precision is unknown.
        BackendError: a graph overflows in the precision, or the engines cannot be written.
    """
    if precision not in PRECISIONS:
        raise InvalidRequest(
            "precision", f"{precision!r} is not one of {BACKEND}", f"allowed are {', '.join(PRECISIONS)}"
        )
    opened = Bundle.load(bundle)
    index = EngineIndex(backend=BACKEND, precision=precision, engines={})
    with staged(opened.folder, index) as folder:
        for done, graph in enumerate(opened.manifest.graphs):
            on_progress(f"{graph} ({done + 1}/{len(opened.manifest.graphs)})", done / len(opened.manifest.graphs))
            path = folder / f"{graph}.onnx"
            write_typed(typed_graph(opened, graph, precision, _fuse), path)
            gc.collect()  # the graph's mapped weights, which hang in cycles: gigabytes
            errors = check_precision(opened, graph, precision, path) if check and precision != "fp32" else {}
            gc.collect()
            weights = [file for file in (path.with_suffix(".weights"),) if file.exists()]
            spec = any_size_spec(opened, graph, BACKEND, precision, onnxruntime.__version__)
            index.engines[graph] = engine_record(path, spec, {"errors": errors}, *weights)
    return index


def _fuse(model: ir.Model) -> None:
    """Self-attention, spatial and temporal; attention to the text is left, whose scores are small."""
    fuse_multi_head_attention(model, _is_self_attention)


def _is_self_attention(name: str) -> bool:
    return is_spatial_self_attention(name) or is_temporal_attention(name)
