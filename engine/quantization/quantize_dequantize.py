"""Rounds matrix layers to 8 bits with QuantizeLinear and DequantizeLinear.

Weights have a scale per output channel, activations one per tensor; both are symmetric. A library that finds the pair
before a layer multiplies 8 bits by 8 bits. Everything else keeps its type in the graph.
"""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from .layers import layer_input, layer_weight, output_axis, quantizable
from .number_formats import NumberFormat


def quantize(model: ir.Model, ranges: Mapping[str, float], numbers: NumberFormat) -> int:
    """Rounds every matrix layer with a known input range, in place; returns how many.

    Args:
        model: a typed graph. The scales get the type of a layer's weight.
        ranges: the magnitude of each layer's input that becomes the largest number, by the layer's name.
        numbers: the format.
    """
    found = [node for node in quantizable(model) if node.name in ranges]
    inputs: dict[ir.Value, ir.Value] = {}
    for node in found:
        source = layer_input(node)
        if source not in inputs:
            inputs[source] = _activation(model.graph, node, ranges[node.name or ""], numbers)
        node.replace_input_with(0, inputs[source])
        node.replace_input_with(1, _weight(model.graph, node, numbers))
    for name in [name for name, value in model.graph.initializers.items() if not value.uses()]:
        del model.graph.initializers[name]
    return len(found)


def _activation(graph: ir.Graph, node: ir.Node, magnitude: float, numbers: NumberFormat) -> ir.Value:
    """Rounds the input of `node` and returns it as floats again."""
    source, floats = layer_input(node), _type(layer_weight(node))
    name = f"{source.name}.{numbers.name}"
    scale = _initializer(graph, ir.Tensor(_in(floats, numbers.scale(magnitude)), dtype=floats, name=f"{name}.scale"))
    zero = _initializer(graph, ir.Tensor(numbers.round(np.zeros(())), dtype=numbers.dtype, name=f"{name}.zero"))
    down = ir.node("QuantizeLinear", [source, scale, zero], name=f"{name}/QuantizeLinear")
    up = ir.node("DequantizeLinear", [down.outputs[0], scale, zero], name=f"{name}/DequantizeLinear")
    down.outputs[0].name, up.outputs[0].name = name, f"{name}.values"
    producer = source.producer()
    if producer is None:
        graph.insert_before(graph[0], [down, up])
    else:
        graph.insert_after(producer, [down, up])
    return up.outputs[0]


def _weight(graph: ir.Graph, node: ir.Node, numbers: NumberFormat) -> ir.Value:
    """Rounds the weight of `node` and returns it as floats again."""
    weight, axis = layer_weight(node), output_axis(node)
    source, floats = weight.const_value, _type(weight)
    assert source is not None
    shape = [int(size) for size in source.shape]

    def scale() -> NDArray[np.floating]:
        others = tuple(index for index in range(len(shape)) if index != axis)
        return _in(floats, numbers.scale(np.abs(source.numpy()).max(axis=others).astype(np.float32)))

    def rounded() -> NDArray[np.generic]:
        along = [size if index == axis else 1 for index, size in enumerate(shape)]
        return numbers.round(source.numpy().astype(np.float32) / scale().astype(np.float32).reshape(along))

    name = f"{weight.name}.{numbers.name}"
    low = ir.LazyTensor(
        lambda: ir.Tensor(rounded(), dtype=numbers.dtype), dtype=numbers.dtype, shape=ir.Shape(shape), name=name
    )
    scales = ir.LazyTensor(
        lambda: ir.Tensor(scale(), dtype=floats), dtype=floats, shape=ir.Shape([shape[axis]]), name=f"{name}.scale"
    )
    inputs = [_initializer(graph, low), _initializer(graph, scales)]
    back = ir.node("DequantizeLinear", inputs, {"axis": axis}, name=f"{name}/DequantizeLinear")
    back.outputs[0].name = f"{name}.values"
    graph.insert_before(node, back)
    return back.outputs[0]


def _type(weight: ir.Value) -> ir.DataType:
    """Returns the type that a layer computes in when it is not quantized."""
    assert weight.const_value is not None
    return ir.DataType(weight.const_value.dtype)


def _in(floats: ir.DataType, scale: NDArray[np.float32]) -> NDArray[np.floating]:
    """Returns a scale in a type."""
    return scale.astype(floats.numpy())


def _initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    value = ir.Value(
        name=tensor.name, const_value=tensor, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype)
    )
    graph.register_initializer(value)
    return value
