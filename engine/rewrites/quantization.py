"""Int8 with QuantizeLinear and DequantizeLinear: weights per output channel, activations per tensor.

Matrix layers multiply int8 by int8; everything else keeps its type in the graph (Jacob et al. 2018, arXiv:1712.05877,
symmetric as in arXiv:2004.09602).
"""

import re
from collections.abc import Container, Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

_LEVELS = 127
_SMALLEST = 1e-6
_LEFT = re.compile(r"(^|\.)(conv_in|conv_out|time_emb\w*|controlnet_cond_embedding)(\.|/)|/(Gemm)_|attn2\.to_[kv]/")
"""Matrix layers that keep their type: first and last convolution, time embedding, keys and values of the text."""
_MIN_CHANNELS = 32


def quantizable(model: ir.Model) -> list[ir.Node]:
    """Returns the matrix layers that can be in int8: products with a weight, and convolutions."""
    return [node for node in model.graph if _has_weight(node) and not _LEFT.search(node.name or "")]


def _has_weight(node: ir.Node) -> bool:
    if node.op_type not in ("MatMul", "Conv"):
        return False
    weight = node.inputs[1]
    shape = weight.const_value.shape if weight is not None and weight.const_value is not None else None
    return shape is not None and len(shape) >= 2 and min(int(size) for size in shape[:2]) >= _MIN_CHANNELS


def belongs_to(node: ir.Node, layers: Container[str]) -> bool:
    """Whether a node is one of these layers or adds its bias: product and sum of a linear layer are one kernel."""
    if node.op_type == "Add" and _has_constant(node):
        makers = (value.producer() for value in node.inputs if value is not None)
        return any(maker is not None and maker.name in layers for maker in makers)
    return node.name in layers


def _has_constant(node: ir.Node) -> bool:
    return any(value is not None and value.const_value is not None for value in node.inputs)


def quantize(model: ir.Model, largest: Mapping[str, float]) -> int:
    """Converts every matrix layer with a known input range to int8, in place; returns how many.

    Args:
        model: a typed graph with the nodes of these layers, see `belongs_to`, in fp32.
        largest: the largest magnitude of each layer's input, by the layer's name.
    """
    found = [node for node in quantizable(model) if node.name in largest]
    inputs: dict[ir.Value, ir.Value] = {}
    for node in found:
        source = node.inputs[0]
        assert source is not None
        if source not in inputs:
            inputs[source] = _activation(model.graph, source, largest[node.name or ""])
        node.replace_input_with(0, inputs[source])
        node.replace_input_with(1, _weight(model.graph, node))
    for name in [name for name, value in model.graph.initializers.items() if not value.uses()]:
        del model.graph.initializers[name]
    return len(found)


def _activation(graph: ir.Graph, source: ir.Value, largest: float) -> ir.Value:
    """Rounds `source` to int8 and back."""
    name = f"{source.name}.int8"
    scale = _initializer(graph, ir.tensor(np.float32(max(largest, _SMALLEST) / _LEVELS), name=f"{name}.scale"))
    zero = _initializer(graph, ir.tensor(np.int8(0), name=f"{name}.zero"))
    down = ir.node("QuantizeLinear", [source, scale, zero], name=f"{name}/QuantizeLinear")
    up = ir.node("DequantizeLinear", [down.outputs[0], scale, zero], name=f"{name}/DequantizeLinear")
    down.outputs[0].name, up.outputs[0].name = name, f"{name}.values"
    producer = source.producer()
    if producer is None:
        graph.insert_before(graph[0], [down, up])
    else:
        graph.insert_after(producer, [down, up])
    return up.outputs[0]


def _weight(graph: ir.Graph, node: ir.Node) -> ir.Value:
    """Rounds the weight of `node` to int8 and back."""
    weight = node.inputs[1]
    assert weight is not None
    source = weight.const_value
    assert source is not None
    axis = 1 if node.op_type == "MatMul" else 0
    shape = [int(size) for size in source.shape]

    def scale() -> NDArray[np.float32]:
        others = tuple(index for index in range(len(shape)) if index != axis)
        return np.asarray(np.maximum(np.abs(source.numpy()).max(axis=others), _SMALLEST) / _LEVELS, np.float32)

    def levels() -> NDArray[np.int8]:
        along = [size if index == axis else 1 for index, size in enumerate(shape)]
        return np.asarray(np.rint(source.numpy() / scale().reshape(along)), np.int8)

    name = f"{weight.name}.int8"
    int8 = ir.LazyTensor(lambda: ir.Tensor(levels()), dtype=ir.DataType.INT8, shape=ir.Shape(shape), name=name)
    scales = ir.LazyTensor(
        lambda: ir.Tensor(scale()), dtype=ir.DataType.FLOAT, shape=ir.Shape([shape[axis]]), name=f"{name}.scale"
    )
    inputs = [_initializer(graph, int8), _initializer(graph, scales)]
    back = ir.node("DequantizeLinear", inputs, {"axis": axis}, name=f"{name}/DequantizeLinear")
    back.outputs[0].name = f"{name}.values"
    graph.insert_before(node, back)
    return back.outputs[0]


def _initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    value = ir.Value(
        name=tensor.name, const_value=tensor, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype)
    )
    graph.register_initializer(value)
    return value
