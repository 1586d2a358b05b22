"""How far a typed graph is from fp32, before anything is built of it.

ONNX Runtime's CPU provider computes fp16 graphs in fp32 between its kernels: it would hide what overflows. So the
typed graph is computed in fp32 with every result rounded to its type, which is what a GPU does whose kernels
accumulate in fp32.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from ..runtime.bundle import Bundle
from ..runtime.engines import ClipSize, static_shapes
from ..runtime.errors import BackendError, first_line
from .fusions import DECOMPOSABLE
from .precision import MOVES

STRESS = 30.0
"""Factor on all activations that come in, at which nothing may overflow."""
_LOW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_FLOAT = ir.DataType.FLOAT

Feeds = dict[str, NDArray[Any]]


def check_precision(bundle: Bundle, graph: str, precision: str, typed: Path) -> dict[str, float]:
    """Errors of a typed graph against the portable one, on random inputs of a small size.

    Args:
        bundle: the bundle.
        graph: name of the graph.
        precision: fp16 or bf16.
        typed: the typed graph; files may be written beside it.

    Returns:
        For each output the largest error, relative to its largest value; for uint8 frames the mean in levels.

    Raises:
        BackendError: an output has NaN or infinity, also where what comes in is scaled up by 30.
    """
    feeds = random_inputs(bundle, graph)
    (expected,) = _run(bundle.folder / bundle.graph(graph).path, feeds)
    rounded = typed.with_suffix(".rounded.onnx")
    try:
        model = ir.load(typed)
        round_results(model)
        ir.save(model, rounded)  # shares the typed graph's weights
        stressed_feeds = {name: _stress(name, values) for name, values in feeds.items()}
        actual, stressed = _run(rounded, feeds, stressed_feeds)
    finally:
        rounded.unlink(missing_ok=True)
    for outputs, what in ((actual, ""), (stressed, f" with activations scaled up by {STRESS:g}")):
        if bad := [name for name, values in outputs.items() if not np.isfinite(values).all()]:
            raise BackendError(
                f"build: {graph!r} in {precision} gives NaN or infinity in {bad[0]!r}{what}; "
                "build with --precision bf16 or fp32"
            )
    return {name: _error(actual[name], values) for name, values in expected.items()}


def round_results(model: ir.Model) -> None:
    """Turns a typed graph into one that computes in fp32 and rounds every result to its type."""
    graph = model.graph
    low = {value: value.const_value.dtype for value in graph.initializers.values() if value.const_value is not None}
    types = {value: dtype for value, dtype in low.items() if dtype in _LOW}
    widened: dict[ir.Value, ir.Value] = {}
    for value in graph.inputs:
        if value.dtype in _LOW:
            types[value], value.dtype = value.dtype, _FLOAT
    for node in list(graph):
        node.attributes.pop(DECOMPOSABLE, None)
        for index, value in enumerate(node.inputs):
            if value is not None and value in low and low[value] in _LOW:
                if value not in widened:
                    cast = _cast(value, _FLOAT, f"{value.name}.widened")
                    graph.insert_before(graph[0], cast)
                    widened[value] = cast.outputs[0]
                node.replace_input_with(index, widened[value])
                types[widened[value]] = low[value]
        for output, dtype in _result_types(node, types):
            types[output] = dtype
            if node.op_type not in MOVES or node.op_type in ("Pad", "Resize"):
                types[_round(graph, node, output, dtype)] = dtype
        if node.op_type == "Cast" and ir.DataType(node.attributes["to"].as_int()) in _LOW:
            node.attributes["to"] = ir.AttrInt64("to", int(_FLOAT))
    for value in graph.outputs:
        if value.dtype in _LOW:
            value.dtype = _FLOAT


def _cast(value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
    node = ir.node("Cast", [value], {"to": int(dtype)}, name=f"{name}/Cast")
    node.outputs[0].name = name
    return node


def _result_types(node: ir.Node, types: dict[ir.Value, ir.DataType]) -> list[tuple[ir.Value, ir.DataType]]:
    """The outputs of a node that are of a low type: it has that of its first float input, a cast its own."""
    if node.op_type == "Cast":
        target = ir.DataType(node.attributes["to"].as_int())
        return [(node.outputs[0], target)] if target in _LOW else []
    if node.op_type == "Shape":
        return []
    dtype = next((types[value] for value in node.inputs if value in types), None)
    return [(output, dtype) for output in node.outputs] if dtype is not None else []


def _round(graph: ir.Graph, node: ir.Node, output: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Puts two casts, down and up again, behind an output; returns what its users then take."""
    users = list(output.uses())
    down = _cast(output, dtype, f"{output.name}.low")
    up = _cast(down.outputs[0], _FLOAT, f"{output.name}.rounded")
    graph.insert_after(node, [down, up])
    for use in users:
        use.node.replace_input_with(use.idx, up.outputs[0])
    for index, value in enumerate(graph.outputs):
        if value is output:
            name, up.outputs[0].shape, up.outputs[0].dtype = value.name, value.shape, _FLOAT
            value.name, value.type, value.shape = f"{name}.exact", None, None
            up.outputs[0].name = name
            graph.outputs[index] = up.outputs[0]
    return up.outputs[0]


def random_inputs(bundle: Bundle, graph: str, seed: int = 0) -> Feeds:
    """Inputs of the smallest size, as they come in a request."""
    manifest = bundle.manifest
    generator = np.random.default_rng(seed)
    frames = min(4, manifest.sizes.max_frames)
    size = ClipSize(width=manifest.sizes.multiple, height=manifest.sizes.multiple, frames=frames)
    shapes = static_shapes(manifest, graph, size)
    feeds: Feeds = {}
    for item in manifest.graphs[graph].inputs:
        shape = shapes[item.name]
        if item.name == "timestep":
            values: Any = np.full(shape, 499.0)
        elif item.name == "conditioning_mask":
            values = np.arange(*shape) < shape[0] - 1
        elif item.name == "frame_index":
            values = np.arange(*shape) % (manifest.keyframe_slots + 1)
        elif item.dtype in ("uint8", "int64"):
            values = generator.integers(0, 256, shape)
        else:
            values = generator.standard_normal(shape)
        feeds[item.name] = values.astype(item.dtype)
    return feeds


def _stress(name: str, values: NDArray[Any]) -> NDArray[Any]:
    scaled = values.dtype == np.float32 and not re.search("timestep|mask|coefficients|guidance", name)
    return values * np.float32(STRESS) if scaled else values


def _run(path: Path, *requests: Feeds) -> list[Feeds]:
    """Outputs by name for each request, fp32 or uint8; without optimisations, which would take the rounding away."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = [item.name for item in session.get_outputs()]
        return [dict(zip(names, map(np.asarray, session.run(None, feeds)), strict=True)) for feeds in requests]
    except Exception as error:  # onnxruntime raises classes of its own that share no public base
        raise BackendError(f"build: ONNX Runtime cannot check {path.name}: {first_line(error)}") from error


def _error(actual: NDArray[Any], expected: NDArray[Any]) -> float:
    difference = np.abs(actual.astype(np.float64) - expected)
    if expected.dtype == np.uint8:
        return float(difference.mean())
    return float(difference.max() / max(np.abs(expected).max(), 1e-12))
