"""Engines for OpenVINO: typed graphs for any size, with the rewrites that spare a processor work.

OpenVINO compiles them at a request for its size. It keeps to the types that stand in the graph, where its own choice
of bf16 would round what carries the error (the sums that run through the network, foremost).
"""

import gc
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ..runtime.cpu.openvino import (
    OpenVinoSession,
    OpenVinoSessions,
    best_precision,
    compile_options,
    version,
)
from ..runtime.errors import BackendError
from ..runtime.example_requests import run_samples
from ..runtime.format.build_options import BuildOptions, OnBuildProgress
from ..runtime.format.bundle import Bundle
from ..runtime.format.engine_keys import EngineIndex
from .calibration import ObservedGraph, ObservingSessions
from .check import output_error, random_inputs, run_portable
from .engine_writer import any_size_spec, engine_record, staged
from .rewrites.attention import fuse_attention, is_transformer_attention
from .rewrites.channels_last import norm_by_channels, turn_motion_modules
from .rewrites.identities import fold_upsampling, split_gated_units
from .rewrites.quantization import belongs_to, quantize
from .rewrites.typed_graph import typed_graph, write_typed
from .rewrites.types import is_residual_stream
from .rewrites.winograd import filter_convolutions

IN_FP32 = ("text_encoder", "lcm_update")
"""Graphs that run as they are: once a request, or of no weight."""

IN_INT8 = ("unet", "controlnet_")
"""What the graphs' names begin with that int8 is for; the others run in `best_precision`, as what is around int8."""

FILTERED = ("unet", "vae_")
"""What the graphs' names begin with whose fp32 convolutions are rewritten; SparseCtrl runs once, and would grow."""

OPTIONS: frozenset[str] = frozenset()
"""Options of a build besides those that every backend takes."""


def build(bundle: Bundle, backend: str, options: BuildOptions, on_progress: OnBuildProgress) -> EngineIndex:
    """Writes an engine for each graph that is worth one.

    Without a precision it is bf16 if the processor computes in it, else fp32. So is what int8 leaves.

    Raises:
        BackendError: OpenVINO is missing, cannot compile a graph or gets no finite result of it, or the engines cannot
            be written.
    """
    built_by = version()
    precision = options.precision or best_precision()
    types = best_precision() if precision == "int8" else precision
    index = EngineIndex(backend=backend, precision=precision, engines={})
    graphs = [graph for graph in bundle.manifest.graphs if graph not in IN_FP32]
    with staged(bundle.folder, index) as folder:
        ranges: dict[str, dict[str, float]] = {}
        if precision == "int8":
            on_progress("reading the ranges of activations off sample requests", 0.0)
            ranges = calibrate(bundle, folder, types)
        for done, graph in enumerate(graphs):
            on_progress(f"{graph} ({done + 1}/{len(graphs)})", done / len(graphs))
            path = folder / f"{graph}.onnx"
            in_int8 = precision == "int8" and graph.startswith(IN_INT8)
            filtered = types == "fp32" and graph.startswith(FILTERED) and not in_int8
            model = _typed(bundle, graph, types, ranges.get(graph, {}), filtered)
            write_typed(model, path)
            del model
            gc.collect()  # the graph's mapped weights, which hang in cycles: gigabytes
            errors = compare(bundle, graph, path, precision) if options.check else {}
            weights = [file for file in (path.with_suffix(".weights"),) if file.exists()]
            spec = any_size_spec(bundle, graph, backend, precision, built_by)
            index.engines[graph] = engine_record(path, spec, {"errors": errors}, *weights)
    return index


def calibrate(bundle: Bundle, folder: Path, precision: str) -> dict[str, dict[str, float]]:
    """The largest magnitude of what each matrix layer takes in, by graph and layer, over the requests.

    Args:
        bundle: the bundle.
        folder: takes graphs that look on, for the time of the requests.
        precision: of the graphs that look on.
    """
    observed = {}
    for graph in bundle.manifest.graphs:
        if graph.startswith(IN_INT8):
            path, model = folder / f"{graph}.observed.onnx", _typed(bundle, graph, precision, {})
            observed[graph] = (path, ObservedGraph(model))
            write_typed(model, path)
            del model
            gc.collect()
    sessions = ObservingSessions(bundle, observed, OpenVinoSessions(bundle, "fp32"), precision)
    try:
        run_samples(bundle, sessions)
    finally:
        sessions.close()
    for path, _ in observed.values():
        path.unlink()
        path.with_suffix(".weights").unlink(missing_ok=True)
    return {graph: seen.ranges() for graph, (_, seen) in observed.items()}


def compare(bundle: Bundle, graph: str, path: Path, precision: str) -> dict[str, float]:
    """Errors of an engine as OpenVINO computes it, against the portable graph on ONNX Runtime.

    Returns:
        For each output the largest error, relative to its largest value; for uint8 frames the mean in levels.

    Raises:
        BackendError: OpenVINO cannot compile the engine, or an output is not finite.
    """
    feeds, record = random_inputs(bundle, graph), bundle.graph(graph)
    (expected,) = run_portable(bundle.folder / record.path, feeds)
    gc.collect()
    shapes = {name: array.shape for name, array in feeds.items()}
    session = OpenVinoSession(path, record, shapes, "CPU", compile_options("CPU", precision))
    actual = dict(zip([item.name for item in record.outputs], session.run(feeds), strict=True))
    if bad := [name for name, values in actual.items() if not np.isfinite(values).all()]:
        raise BackendError(
            "build", f"{graph!r} in {precision} gives NaN or infinity at {bad[0]!r}", "build another precision"
        )
    return {name: output_error(actual[name], values) for name, values in expected.items()}


def _typed(bundle: Bundle, graph: str, precision: str, ranges: Mapping[str, float], filtered: bool = False) -> ir.Model:
    """A graph with all rewrites; layers with a range are in int8, with fp32 around it.

    Args:
        bundle: the bundle.
        graph: name of the graph.
        precision: of what has no range.
        ranges: the largest magnitude of each int8 layer's input.
        filtered: whether convolutions become fewer products.
    """

    def rewrite(model: ir.Model) -> None:
        fuse_attention(model, is_transformer_attention)
        split_gated_units(model)
        if precision == "bf16":
            turn_motion_modules(model)
            norm_by_channels(model)
        if filtered:
            filter_convolutions(model)
        fold_upsampling(model)

    model = typed_graph(
        bundle, graph, precision, rewrite, lambda node: is_residual_stream(node) or belongs_to(node, ranges)
    )
    quantize(model, ranges)
    return model
