"""Engines for OpenVINO: typed graphs for any size, with rewrites that save a CPU work.

OpenVINO compiles them for the size of a request. The graph fixes the type of every value: if OpenVINO chose bf16
itself, it would round the values that carry the error, above all the residual streams.
"""

import gc
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ..runtime.cpu.integer_products import multiplies_tiles
from ..runtime.cpu.openvino import (
    OpenVinoSession,
    OpenVinoSessions,
    best_precision,
    compile_options,
    version,
)
from ..runtime.errors import BackendError
from ..runtime.format.build_options import BuildOptions, OnBuildProgress
from ..runtime.format.bundle import Bundle
from ..runtime.format.engine_keys import EngineIndex, EngineRecord, EngineSpec
from ..runtime.format.manifest import GraphRecord
from . import comparison
from .check import random_inputs, run_portable
from .engine_writer import SetBuild, any_size_spec, engine_record, write_set
from .quantization.layers import belongs_to
from .quantization.number_formats import INT8
from .quantization.observer import Statistics, depends_on, observe_samples
from .quantization.quantize_dequantize import quantize
from .quantization.smoothing import smooth
from .rewrites.attention import fuse_attention, is_transformer_attention
from .rewrites.channels_last import norm_by_channels, turn_motion_modules
from .rewrites.exact_simplifications import split_gated_units
from .rewrites.precision import is_last_convolution, is_residual_stream
from .rewrites.small_images import join_small_images
from .rewrites.typed_graph import typed_graph, write_typed
from .rewrites.upsampling import fold_upsampling
from .rewrites.winograd import filter_convolutions

IN_FP32 = ("text_encoder", "lcm_update")
"""Graphs that run as exported: they run once per request, or have no weights."""

IN_INT8 = ("unet", "controlnet_")
"""Name prefixes of the int8 graphs. Other graphs, and the layers around int8, run in `best_precision`. These have small
images at their deepest levels, which are computed at once."""

_KEYS_OVER_TIME = r"\.motion_modules\..*attn2\.to_[kv]/"
"""Keys and values of the second attentions over time. Their frames in int8 have not been compared."""
_STREAM = r"\.(conv_shortcut|downsamplers\.\d+\.conv)/ | ^controlnet_(down|mid)_block"
"""Convolutions that take a residual stream itself."""


def _layers(pattern: str) -> re.Pattern[str]:
    return re.compile(f"{pattern} | {_KEYS_OVER_TIME}", re.VERBOSE)


_FEW = _layers(
    r"""
    ^(down_blocks\.\d\.resnets\.0|up_blocks\.(2\.resnets\.0|[123]\.resnets\.[12]))\.conv_shortcut/
    | ^down_blocks\.0\.downsamplers\.
    | ^controlnet_(down_blocks\.(0|9|10|11)|mid_block)/     # the first, and those of the fewest pixels
    | ^down_blocks\.0\.(attentions|motion_modules)\.0\..*proj_(in|out)/  # of the first two transformers
    """
)
LEFT_IN_INT8 = {
    "bf16": {
        "unet": _layers(
            rf"""
            {_STREAM}
            | ^down_blocks\.0\..*(proj_in|proj_out|to_out\.0|ff\.net\.2)/
            | ^down_blocks\.[12]\.motion_modules\..*proj_(in|out)/
            """
        ),
        "controlnet_": _layers(
            rf"""
            {_STREAM}
            | (\.motion_modules\.|^down_blocks\.0\.attentions\.).*(proj_in|proj_out|to_out\.0|ff\.net\.2)/
            """
        ),
    },
    "fp32": {"unet": _FEW, "controlnet_": _FEW},
}
"""Layers that keep the other type, by this type and the prefix of the graph. Beside keys and values they are those that
cost the most error for their work (docs/cpu.md): they take or give a residual stream, and the error of the first
transformers goes through all layers after them. In bf16 they are 7% of the UNet's products and 21% of SparseCtrl's.
A product in fp32 takes four times as long as in int8, so that fewer are left out there: 1.9% and 2.5%."""

UNSIGNED = re.compile(r"^down_blocks\.0\.")
"""Matches layers whose inputs after SiLU are unsigned. This halves the error of these inputs, but convolutions take
longer: 3% of SparseCtrl's time if all are unsigned. The error of the first level goes through all layers after it."""

SMALL_IMAGE = {True: 32, False: 4}
"""The most pixels of images that a convolution computes at once, with AMX and without. With AMX it takes a quarter of
the time at 2x2 pixels, half at 4x4, and as long at 8x8; with VNNI a third at 2x2, and longer from 4x4 on."""

FILTERED = ("unet", "vae_")
"""Name prefixes of the graphs whose fp32 convolutions are rewritten. Not SparseCtrl, which would grow by
the filtered weights: it runs once for each guided step, and not again for the next seed."""


def build(bundle: Bundle, backend: str, options: BuildOptions, on_progress: OnBuildProgress) -> EngineIndex:
    """Writes an engine for each graph but those of `IN_FP32`.

    The default precision is bf16 if the processor computes in it, else fp32. With int8, the other layers use it too.

    Raises:
        BackendError: OpenVINO is missing, OpenVINO cannot compile a graph, a result is not finite, or the engines
            cannot be written.
    """
    built_by = version()
    precision = options.precision or best_precision()
    types = best_precision() if precision == "int8" else precision
    inputs: dict[str, dict[str, Statistics]] = {}

    def spec(graph: str) -> EngineSpec:
        return any_size_spec(bundle, graph, backend, precision, built_by)

    def make(graph: str, folder: Path, report: OnBuildProgress) -> EngineRecord:
        in_int8 = precision == "int8" and graph.startswith(IN_INT8)
        if in_int8 and not inputs:
            report("measuring activation ranges on sample requests", 0.0)
            inputs.update(calibrate(bundle, folder, types))
        report("writing", 0.0)
        path = folder / f"{graph}.onnx"
        filtered = types == "fp32" and graph.startswith(FILTERED) and not in_int8
        model = _typed(bundle, graph, types, inputs.get(graph, {}), filtered)
        if graph.startswith(IN_INT8) and (types == "bf16" or in_int8):
            join_small_images(model, SMALL_IMAGE[multiplies_tiles()])
        write_typed(model, path)
        del model
        gc.collect()  # reference cycles keep the graph's weights mapped: gigabytes
        errors = compare(bundle, graph, path, precision) if options.check else {}
        weights = [file for file in (path.with_suffix(".weights"),) if file.exists()]
        return engine_record(path, spec(graph), {"errors": errors}, *weights)

    index = EngineIndex(backend=backend, precision=precision, engines={})
    graphs = [graph for graph in bundle.manifest.graphs if graph not in IN_FP32]
    made_with: dict[str, object] = {"types": types}
    if precision == "int8":
        made_with |= depends_on(bundle)
    return write_set(bundle, SetBuild(index, graphs, spec, make, made_with), options, on_progress)


def calibrate(bundle: Bundle, folder: Path, precision: str) -> dict[str, dict[str, Statistics]]:
    """Returns what comes into each int8 layer in the sample requests, by graph and layer.

    Args:
        bundle: the bundle.
        folder: holds the observed graphs while the requests run.
        precision: of the observed graphs, and of the layers beside int8.
    """

    def open_session(path: Path, record: GraphRecord, shapes: Mapping[str, tuple[int, ...]]) -> OpenVinoSession:
        return OpenVinoSession(path, record, shapes, "CPU", compile_options("CPU", precision))

    models = {
        graph: partial(_typed, bundle, graph, precision, {})
        for graph in bundle.manifest.graphs
        if graph.startswith(IN_INT8)
    }
    found = observe_samples(bundle, folder, models, OpenVinoSessions(bundle, "fp32"), open_session, means=True)
    return {
        graph: {layer: seen for layer, seen in of.items() if not is_left_out(graph, layer, precision)}
        for graph, of in found.items()
    }


def is_left_out(graph: str, layer: str, precision: str) -> bool:
    """Whether a layer keeps the precision that stands beside int8."""
    return any(left.search(layer) for prefix, left in LEFT_IN_INT8[precision].items() if graph.startswith(prefix))


def compare(bundle: Bundle, graph: str, path: Path, precision: str) -> dict[str, float]:
    """Compares an engine on OpenVINO with the portable graph on ONNX Runtime.

    Returns:
        For each output the largest error relative to its largest value; for uint8 frames the mean error in levels.

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
    return comparison.errors(actual, expected)


def _typed(
    bundle: Bundle, graph: str, precision: str, inputs: Mapping[str, Statistics], filtered: bool = False
) -> ir.Model:
    """Returns a graph with all rewrites. Layers whose input was observed are in int8, with fp32 around them.

    Args:
        bundle: the bundle.
        graph: name of the graph.
        precision: of the other layers.
        inputs: what came into each layer, without those that are left out of int8.
        filtered: whether to rewrite 3x3 convolutions as in `rewrites.winograd`.
    """

    def rewrite(model: ir.Model) -> None:
        fuse_attention(model, is_transformer_attention)
        split_gated_units(model)
        if precision == "bf16" or inputs:  # their convolutions keep channels innermost
            turn_motion_modules(model)
            norm_by_channels(model)
        if filtered:
            filter_convolutions(model)
        fold_upsampling(model)

    def stays_in_fp32(node: ir.Node) -> bool:
        return is_residual_stream(node) or is_last_convolution(node) or belongs_to(node, inputs)

    model = typed_graph(bundle, graph, precision, rewrite, stays_in_fp32)
    roundings = {
        layer: rounding if UNSIGNED.search(layer) else replace(rounding, smallest=None)
        for layer, rounding in smooth(model, inputs).items()
    }
    quantize(model, roundings, INT8)
    return model
