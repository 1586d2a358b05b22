"""Measures how far a typed graph is from fp32, before an engine is built from it.

ONNX Runtime's CPU provider computes fp16 graphs in fp32 between its kernels, which would hide overflows. So the check
computes the typed graph in fp32 and rounds every result to its type. GPU kernels that accumulate in fp32 do the same.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from ..runtime.errors import BackendError, first_line
from ..runtime.format.bundle import Bundle
from ..runtime.format.clip_layout import ClipSize, static_shapes
from . import comparison
from .rewrites.attention import DECOMPOSABLE
from .rewrites.node_helpers import cast, hand_over, insert_behind
from .rewrites.precision import MOVES

STRESS = 30.0
"""Factor on all incoming activations. Nothing may overflow with it."""
_SCALE = "scale_of_activations"
LARGEST = "largest_magnitudes"
_SCALARS = re.compile("timestep|mask|coefficients|guidance|conditioning_scale")
_LOW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_FLOAT = ir.DataType.FLOAT

Feeds = dict[str, NDArray[Any]]


def check_precision(
    bundle: Bundle, graph: str, precision: str, typed: Path, size: ClipSize | None = None
) -> dict[str, float]:
    """Compares a typed graph with the portable one on random inputs of a small size.

    Args:
        bundle: the bundle.
        graph: name of the graph.
        precision: fp16, bf16 or fp8.
        typed: the typed graph; files may be written beside it.
        size: of the inputs; see `random_inputs`.

    Returns:
        For each output the largest error relative to its largest value; for uint8 frames the mean error in levels.

    Raises:
        BackendError: a result within the graph overflows, as it is or with incoming activations scaled up by 30.
    """
    feeds = random_inputs(bundle, graph, size=size)
    (expected,) = run_portable(bundle.folder / bundle.graph(graph).path, feeds)
    rounded = typed.with_suffix(".rounded.onnx")
    try:
        model = ir.load(typed)
        observed = observe(model, round_results(model))
        ir.save(model, rounded)  # shares the typed graph's weights
        scales = (np.ones(1, np.float32), np.full(1, STRESS, np.float32))
        actual, stressed = run_portable(rounded, *({**feeds, _SCALE: scale} for scale in scales))
    finally:
        rounded.unlink(missing_ok=True)
    for outputs, what in ((actual, ""), (stressed, f" with activations scaled up by {STRESS:g}")):
        largest = outputs.pop(LARGEST)
        if bad := [name for name, value in zip(observed, largest, strict=True) if not np.isfinite(value)]:
            raise BackendError(
                "build",
                f"{graph!r} in {precision} gives NaN or infinity at {bad[0]!r}{what}",
                "build in bf16 or fp32",
            )
    return comparison.errors(actual, expected)


def round_results(model: ir.Model) -> list[ir.Value]:
    """Makes a typed graph compute in fp32 and round every result to its type; returns the rounded values."""
    graph = model.graph
    types = {value: value.const_value.dtype for value in graph.initializers.values() if value.const_value is not None}
    types = {value: dtype for value, dtype in types.items() if dtype in _LOW}
    weights = set(types)
    widened: dict[ir.Value, ir.Value] = {}
    rounded = []
    for value in graph.inputs:
        if value.dtype in _LOW:
            types[value], value.dtype = value.dtype, _FLOAT
    for node in list(graph):
        node.attributes.pop(DECOMPOSABLE, None)
        for index, value in enumerate(node.inputs):
            if value is not None and value in weights:
                if value not in widened:
                    widening = cast(value, _FLOAT, f"{value.name}.widened")
                    graph.insert_before(graph[0], widening)
                    widened[value] = widening.outputs[0]
                    types[widened[value]] = types[value]
                node.replace_input_with(index, widened[value])
        for output, dtype in _result_types(node, types):
            types[output] = dtype
            if node.op_type not in MOVES or node.op_type in ("Pad", "Resize"):
                rounded.append(_round(graph, node, output, dtype))
                types[rounded[-1]] = dtype
        if node.op_type == "Cast" and ir.DataType(node.attributes["to"].as_int()) in _LOW:
            node.attributes["to"] = ir.AttrInt64("to", int(_FLOAT))
            node.outputs[0].dtype = _FLOAT
    for value in graph.outputs:
        if value.dtype in _LOW:
            value.dtype = _FLOAT
    return rounded


def observe(model: ir.Model, values: list[ir.Value]) -> list[str]:
    """Adds an output with the largest magnitude of each value, and an input that scales all incoming activations.

    Returns:
        The names of the values.
    """
    graph = model.graph
    scale = ir.Value(name=_SCALE, type=ir.TensorType(_FLOAT), shape=ir.Shape([1]))
    for value, users in [(value, list(value.uses())) for value in _incoming(graph)]:
        node = ir.node("Mul", [value, scale], name=f"{value.name}/{_SCALE}")
        node.outputs[0].name = f"{value.name}.scaled"
        insert_behind(graph, value, node)
        for use in users:
            use.node.replace_input_with(use.idx, node.outputs[0])
    graph.inputs.append(scale)
    observe_largest(graph, values or [scale])
    return [str(value.name) for value in values or [scale]]


def observe_largest(graph: ir.Graph, values: list[ir.Value]) -> None:
    """Adds one output, fp32 [N], with the largest magnitude of each of N values."""
    whole = ir.Value(name="whole", const_value=ir.tensor([-1], dtype=ir.DataType.INT64, name="whole"))
    graph.initializers["whole"] = whole
    maxima = []
    for index, value in enumerate(values):
        chain = [ir.node("Abs", [value])]
        chain.append(ir.node("Reshape", [chain[0].outputs[0], whole]))
        chain.append(ir.node("ReduceMax", [chain[1].outputs[0]], {"keepdims": 1}))
        chain.append(ir.node("Cast", [chain[2].outputs[0]], {"to": int(_FLOAT)}))
        for node in chain:
            node.name = node.outputs[0].name = f"observed.{index}.{node.op_type}"
        graph.extend(chain)
        maxima.append(chain[-1].outputs[0])
    largest = ir.node("Concat", maxima, {"axis": 0}, name=LARGEST)
    output = largest.outputs[0]
    output.name, output.type, output.shape = LARGEST, ir.TensorType(_FLOAT), ir.Shape([len(maxima)])
    graph.append(largest)
    graph.outputs.append(output)


def _incoming(graph: ir.Graph) -> list[ir.Value]:
    """Returns the incoming activations of a graph: float inputs, pixels as floats, token embeddings."""
    values = [value for value in graph.inputs if value.dtype == _FLOAT and not _SCALARS.search(str(value.name))]
    pixels = {value for value in graph.inputs if value.dtype == ir.DataType.UINT8}
    for node in graph:
        source = node.inputs[0] if node.inputs else None
        made_of_pixels = node.op_type == "Cast" and source in pixels
        looked_up = node.op_type == "Gather" and source is not None and str(source.name).endswith(".weight.widened")
        if made_of_pixels or looked_up:
            values.append(node.outputs[0])
    return values


def _result_types(node: ir.Node, types: dict[ir.Value, ir.DataType]) -> list[tuple[ir.Value, ir.DataType]]:
    """Returns the outputs in a low type: that of the first float input, or the target type of a cast."""
    if node.op_type == "Cast":
        target = ir.DataType(node.attributes["to"].as_int())
        return [(node.outputs[0], target)] if target in _LOW else []
    if node.op_type in ("Shape", "QuantizeLinear"):  # 8-bit numbers are rounded by the operator itself
        return []
    dtype = next((types[value] for value in node.inputs if value in types), None)
    return [(output, dtype) for output in node.outputs] if dtype is not None else []


def _round(graph: ir.Graph, node: ir.Node, output: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Inserts a cast down and a cast up after an output; returns the value that its users now take."""
    uses = list(output.uses())
    down = cast(output, dtype, f"{output.name}.low")
    up = cast(down.outputs[0], _FLOAT, f"{output.name}.rounded")
    graph.insert_after(node, [down, up])
    hand_over(graph, output, up.outputs[0], uses)
    return up.outputs[0]


def random_inputs(bundle: Bundle, graph: str, seed: int = 0, size: ClipSize | None = None) -> Feeds:
    """Makes random inputs with the value ranges of a request.

    Args:
        bundle: the bundle.
        graph: name of the graph.
        seed: of the values.
        size: of the clip. None takes 4 frames of 4x5 latents. Of these sides one can be halved at two levels and the
            other cannot, so that the UNet's upsamplers are checked both ways.
    """
    manifest = bundle.manifest
    generator = np.random.default_rng(seed)
    if size is None:
        factor, frames = manifest.sizes.vae_scale_factor, min(4, manifest.sizes.max_frames)
        size = ClipSize(width=5 * factor, height=4 * factor, frames=frames)
    shapes = static_shapes(manifest, graph, size)
    feeds: Feeds = {}
    for item in manifest.graphs[graph].inputs:
        shape = shapes[item.name]
        if item.name == "timestep":
            values: Any = np.full(shape, 499.0)
        elif item.name == "conditioning_scale":
            values = np.ones(shape)
        elif item.name == "clip_skip":
            values = np.zeros(shape)
        elif item.name == "attention_mask":
            values = np.broadcast_to(np.arange(shape[1]) % 7 != 3, shape)  # the first token is always seen
        elif item.name == "conditioning_mask":
            values = np.arange(*shape) < shape[0] - 1
        elif item.name == "frame_index":
            values = np.arange(*shape) % (manifest.keyframe_slots + 1)
        elif item.dtype in ("uint8", "int64"):
            values = generator.integers(0, 256, shape)
        elif item.name == "conditioning":
            values = _encoded(bundle, generator.integers(0, 256, (shape[0], *shape[2:], 3)))
        else:
            values = generator.standard_normal(shape)
        feeds[item.name] = values.astype(item.dtype)
    return feeds


def _encoded(bundle: Bundle, colours: NDArray[np.int64]) -> NDArray[Any]:
    """Returns the latents [U, 4, h, w] that the bundle's VAE gives of pictures, as in a request.

    Args:
        bundle: the bundle.
        colours: of the squares that the pictures consist of, one for each latent, [U, h, w, 3].
    """
    side = bundle.manifest.sizes.vae_scale_factor
    pictures = colours.astype(np.uint8).repeat(side, axis=1).repeat(side, axis=2)
    (outputs,) = run_portable(bundle.folder / bundle.graph("vae_encoder").path, {"image": pictures})
    (latents,) = outputs.values()
    return np.asarray(latents)


def run_portable(path: Path, *requests: Feeds) -> list[Feeds]:
    """Returns outputs by name for each request, fp32 or uint8, without optimisations, which would undo the rounding."""
    with onnxruntime_errors(path.name):
        session = open_portable(path)
        names = [item.name for item in session.get_outputs()]
        return [dict(zip(names, map(np.asarray, session.run(None, feeds)), strict=True)) for feeds in requests]


@contextmanager
def onnxruntime_errors(graph: str) -> Iterator[None]:
    """Turns ONNX Runtime's errors, which share no public base class, into BackendError."""
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith(onnxruntime.__name__):
            raise
        raise BackendError("build", f"ONNX Runtime cannot check {graph}: {first_line(error)}") from error


def open_portable(path: Path) -> Any:
    """Opens a graph on ONNX Runtime's CPU provider exactly as it is written, without optimisations."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = False
    options.enable_mem_reuse = False  # planning it takes 20 s for the thousands of casts of a rounded UNet
    options.add_session_config_entry("session.disable_prepacking", "1")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
