"""Rounds matrix layers to 8 bits with QuantizeLinear and DequantizeLinear.

Weights have a scale per output channel, activations one per tensor; both are symmetric. A library that finds the pair
before a layer multiplies 8 bits by 8 bits. Everything else keeps its type in the graph.
"""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from .layers import input_axis, layer_input, layer_weight, output_axis, quantizable, weight_shape
from .number_formats import NumberFormat

_SMALLEST_FP16 = float(np.finfo(np.float16).tiny)


def quantize(
    model: ir.Model,
    ranges: Mapping[str, float],
    numbers: NumberFormat,
    divisors: Mapping[str, NDArray[np.float32]] = MappingProxyType({}),
) -> int:
    """Rounds every matrix layer with a known input range, in place; returns how many.

    Args:
        model: a typed graph. The scales get the type of a layer's weight.
        ranges: the magnitude of each layer's input that becomes the largest number, by the layer's name.
        numbers: the format.
        divisors: what each of the C channels of a layer's input is divided by before, [C], by the layer's name; the
            weight is multiplied by it. Layers with the same input have the same.
    """
    found = [node for node in quantizable(model) if node.name in ranges]
    inputs: dict[ir.Value, ir.Value] = {}
    for node in found:
        source = layer_input(node)
        if source not in inputs:
            inputs[source] = _activation(
                model.graph, node, ranges[node.name or ""], numbers, divisors.get(node.name or "")
            )
        node.replace_input_with(0, inputs[source])
        node.replace_input_with(1, _weight(model.graph, node, numbers, divisors.get(node.name or "")))
    for name in [name for name, value in model.graph.initializers.items() if not value.uses()]:
        del model.graph.initializers[name]
    return len(found)


def _activation(
    graph: ir.Graph, node: ir.Node, magnitude: float, numbers: NumberFormat, divisors: NDArray[np.float32] | None
) -> ir.Value:
    """Divides and rounds the input of `node` and returns it as floats again."""
    source, floats = layer_input(node), _type(layer_weight(node))
    name = f"{source.name}.{numbers.name}"
    scale = _initializer(graph, ir.Tensor(_in(floats, numbers.scale(magnitude)), dtype=floats, name=f"{name}.scale"))
    zero = _initializer(graph, ir.Tensor(numbers.round(np.zeros(())), dtype=numbers.dtype, name=f"{name}.zero"))
    nodes = [] if divisors is None else [_division(graph, node, divisors, f"{name}.divided")]
    divided = nodes[0].outputs[0] if nodes else source
    down = ir.node("QuantizeLinear", [divided, scale, zero], name=f"{name}/QuantizeLinear")
    up = ir.node("DequantizeLinear", [down.outputs[0], scale, zero], name=f"{name}/DequantizeLinear")
    down.outputs[0].name, up.outputs[0].name = name, f"{name}.values"
    producer = source.producer()
    if producer is None:
        graph.insert_before(graph[0], [*nodes, down, up])
    else:
        graph.insert_after(producer, [*nodes, down, up])
    return up.outputs[0]


def _division(graph: ir.Graph, node: ir.Node, divisors: NDArray[np.float32], name: str) -> ir.Node:
    """Returns a node that divides each channel of a layer's input."""
    floats, factors = _type(layer_weight(node)), _factors(node, divisors)
    factors = factors.reshape(
        -1, *[1] * (len(weight_shape(node)) - 2)
    )  # channels are second in a convolution, else last
    factor = _initializer(graph, ir.Tensor(factors, dtype=floats, name=f"{name}.factors"))
    division = ir.node("Mul", [layer_input(node), factor], name=f"{name}/Mul")
    division.outputs[0].name = name
    return division


def _factors(node: ir.Node, divisors: NDArray[np.float32]) -> NDArray[np.floating]:
    """Returns what the C channels of a layer's input are multiplied by, [C], in the type of the layer."""
    return _in(_type(layer_weight(node)), np.asarray(1 / divisors, np.float32))


def _weight(graph: ir.Graph, node: ir.Node, numbers: NumberFormat, divisors: NDArray[np.float32] | None) -> ir.Value:
    """Multiplies and rounds the weight of `node` and returns it as floats again."""
    weight, axis = layer_weight(node), output_axis(node)
    source, floats = weight.const_value, _type(weight)
    assert source is not None
    shape = weight_shape(node)

    factors = np.ones(1, np.float32)
    if divisors is not None:
        factors = _along(_factors(node, divisors).astype(np.float32), input_axis(node), len(shape))

    def values() -> NDArray[np.float32]:
        return np.asarray(source.numpy().astype(np.float32) / factors)

    def scale(exact: NDArray[np.float32]) -> NDArray[np.floating]:
        others = tuple(index for index in range(len(shape)) if index != axis)
        return _in(floats, numbers.scale(np.abs(exact).max(axis=others)))

    def rounded() -> NDArray[np.generic]:
        exact = values()
        return numbers.round(exact / _along(scale(exact).astype(np.float32), axis, len(shape)))

    name = f"{weight.name}.{numbers.name}"
    low = ir.LazyTensor(
        lambda: ir.Tensor(rounded(), dtype=numbers.dtype), dtype=numbers.dtype, shape=ir.Shape(shape), name=name
    )
    scales = ir.LazyTensor(
        lambda: ir.Tensor(scale(values()), dtype=floats),
        dtype=floats,
        shape=ir.Shape([shape[axis]]),
        name=f"{name}.scale",
    )
    inputs = [_initializer(graph, low), _initializer(graph, scales)]
    back = ir.node("DequantizeLinear", inputs, {"axis": axis}, name=f"{name}/DequantizeLinear")
    back.outputs[0].name = f"{name}.values"
    graph.insert_before(node, back)
    return back.outputs[0]


def _along(values: NDArray[np.float32], axis: int, dimensions: int) -> NDArray[np.float32]:
    """Returns a row of values in the shape that runs along one axis of an array."""
    return values.reshape([-1 if index == axis else 1 for index in range(dimensions)])


def _type(weight: ir.Value) -> ir.DataType:
    """Returns the type that a layer computes in when it is not quantized."""
    assert weight.const_value is not None
    return ir.DataType(weight.const_value.dtype)


def _in(floats: ir.DataType, scale: NDArray[np.float32]) -> NDArray[np.floating]:
    """Returns a scale in a type; in fp16 at least the smallest number of full precision."""
    return np.maximum(scale, _SMALLEST_FP16 if floats == ir.DataType.FLOAT16 else 0).astype(floats.numpy())


def _initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    value = ir.Value(
        name=tensor.name, const_value=tensor, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype)
    )
    graph.register_initializer(value)
    return value
