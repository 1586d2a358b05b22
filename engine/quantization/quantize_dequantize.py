"""Rounds matrix layers to 8 bits with QuantizeLinear and DequantizeLinear.

Weights have a scale per output channel or one for the layers with the same input, activations one per tensor. Both are
symmetric, but for activations that are hardly below zero. A library that finds the pair before a layer multiplies 8
bits by 8 bits. Everything else keeps its type in the graph.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from types import MappingProxyType
from typing import Self

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ..rewrites.node_helpers import initializer
from . import bias_correction
from .layers import input_axis, layer_input, layer_weight, output_axis, quantizable, weight_shape
from .number_formats import NumberFormat, scale_and_zero

_SMALLEST_FP16 = float(np.finfo(np.float16).tiny)


def quantize(
    model: ir.Model,
    ranges: Mapping[str, float],
    numbers: NumberFormat,
    divisors: Mapping[str, NDArray[np.float32]] = MappingProxyType({}),
    means: Mapping[str, NDArray[np.float32]] = MappingProxyType({}),
    smallest: Mapping[str, float] = MappingProxyType({}),
) -> int:
    """Rounds every matrix layer with a known input range, in place; returns how many.

    Args:
        model: a typed graph. The scales get the type of a layer's weight.
        ranges: the magnitude of each layer's input that becomes the largest number, by the layer's name.
        numbers: the format.
        divisors: what each of the C channels of a layer's input is divided by before, [C], by the layer's name; the
            weight is multiplied by it. Layers with the same input have the same.
        means: the mean of each channel of a layer's input, [C], by the layer's name: the offset that it causes through
            the rounding error of the weight is subtracted from the result (`bias_correction`).
        smallest: the smallest value of a layer's input after the division, by the layer's name: the input becomes
            unsigned integers with a zero point.
    """
    layers: dict[ir.Value, list[ir.Node]] = {}
    for node in quantizable(model):
        if node.name in ranges:
            layers.setdefault(layer_input(node), []).append(node)
    for nodes in layers.values():
        name = nodes[0].name or ""
        weights = [_Weight.of(node, numbers, divisors.get(name)) for node in nodes]
        largest = None if numbers.per_channel else cache(partial(_largest, weights))
        if name in smallest:
            scale, zero = scale_and_zero(ranges[name], smallest[name])
        else:
            scale, zero = numbers.scale(ranges[name]), numbers.round(np.zeros(()))
        rounded = _activation(model.graph, nodes[0], scale, zero, numbers.name, divisors.get(name))
        for node, weight in zip(nodes, weights, strict=True):
            magnitudes = largest or weight.magnitudes
            if node.name in means:
                error = partial(_mean_error, weight, magnitudes, input_axis(node), means[node.name])
                bias_correction.subtract(model.graph, node, error, weight.floats, numbers.name)
            node.replace_input_with(0, rounded)
            node.replace_input_with(1, _rounded_weight(model.graph, node, weight, magnitudes))
    for name in [name for name, value in model.graph.initializers.items() if not value.uses()]:
        del model.graph.initializers[name]
    return sum(map(len, layers.values()))


def _activation(
    graph: ir.Graph,
    node: ir.Node,
    scale: NDArray[np.float32],
    zero: NDArray[np.generic],
    suffix: str,
    divisors: NDArray[np.float32] | None,
) -> ir.Value:
    """Divides and rounds the input of `node` and returns it as floats again."""
    source, floats = layer_input(node), _type(layer_weight(node))
    name = f"{source.name}.{suffix}"
    scales = initializer(graph, ir.Tensor(_in(floats, scale), dtype=floats, name=f"{name}.scale"))
    zeros = initializer(graph, ir.Tensor(zero, dtype=ir.DataType.from_numpy(zero.dtype), name=f"{name}.zero"))
    nodes = [] if divisors is None else [_division(graph, node, divisors, f"{name}.divided")]
    divided = nodes[0].outputs[0] if nodes else source
    down = ir.node("QuantizeLinear", [divided, scales, zeros], name=f"{name}/QuantizeLinear")
    up = ir.node("DequantizeLinear", [down.outputs[0], scales, zeros], name=f"{name}/DequantizeLinear")
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
    factor = initializer(graph, ir.Tensor(factors, dtype=floats, name=f"{name}.factors"))
    division = ir.node("Mul", [layer_input(node), factor], name=f"{name}/Mul")
    division.outputs[0].name = name
    return division


def _factors(node: ir.Node, divisors: NDArray[np.float32]) -> NDArray[np.floating]:
    """Returns what the C channels of a layer's input are multiplied by, [C], in the type of the layer."""
    return _in(_type(layer_weight(node)), np.asarray(1 / divisors, np.float32))


@dataclass(frozen=True, slots=True)
class _Weight:
    """The weight of a layer before it is rounded.

    Attributes:
        name: of the weight.
        tensor: its values.
        numbers: the format that it is rounded to.
        floats: the type that its layer computes in when it is not quantized.
        axis: of its output channels.
        factors: what it is divided by, since its layer's input is multiplied by them.
    """

    name: str
    tensor: ir.TensorProtocol
    numbers: NumberFormat
    floats: ir.DataType
    axis: int
    factors: NDArray[np.float32]

    @classmethod
    def of(cls, node: ir.Node, numbers: NumberFormat, divisors: NDArray[np.float32] | None) -> Self:
        weight, factors = layer_weight(node), np.ones(1, np.float32)
        assert weight.const_value is not None
        if divisors is not None:
            exact = _factors(node, divisors).astype(np.float32)
            factors = _along(exact, input_axis(node), len(weight_shape(node)))
        return cls(str(weight.name), weight.const_value, numbers, _type(weight), output_axis(node), factors)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape.numpy())

    def values(self) -> NDArray[np.float32]:
        """The exact values."""
        return np.asarray(self.tensor.numpy().astype(np.float32) / self.factors)

    def magnitudes(self) -> NDArray[np.float32]:
        """The largest magnitude of each output channel."""
        return np.asarray(np.abs(self.values()).max(axis=tuple(set(range(len(self.shape))) - {self.axis})))

    def scale(self, magnitudes: NDArray[np.float32]) -> NDArray[np.floating]:
        """The scales for these magnitudes, in the type of the layer."""
        return _in(self.floats, self.numbers.scale(magnitudes))

    def rounded(self, magnitudes: NDArray[np.float32]) -> NDArray[np.generic]:
        """The values as numbers of 8 bits."""
        return self.numbers.round(self.values() / self._scale(magnitudes))

    def error(self, magnitudes: NDArray[np.float32]) -> NDArray[np.float32]:
        """How far the rounded weight is from the exact one, for an input that is not divided."""
        found = self.rounded(magnitudes).astype(np.float32) * self._scale(magnitudes) - self.values()
        return np.asarray(found * self.factors)

    def _scale(self, magnitudes: NDArray[np.float32]) -> NDArray[np.float32]:
        scale = self.scale(magnitudes).astype(np.float32)
        return _along(scale, self.axis, len(self.shape)) if scale.ndim else scale


def _largest(weights: Iterable[_Weight]) -> NDArray[np.float32]:
    """Returns the largest magnitude of all weights."""
    return np.asarray(max(weight.magnitudes().max() for weight in weights))


def _mean_error(
    weight: _Weight, magnitudes: Callable[[], NDArray[np.float32]], axis: int, means: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Returns how far a layer's result is off if its input is everywhere its mean, fp32 [out]."""
    error = weight.error(magnitudes()) * _along(means, axis, len(weight.shape))
    return np.asarray(error.sum(axis=tuple(set(range(error.ndim)) - {weight.axis}), dtype=np.float64), np.float32)


def _rounded_weight(
    graph: ir.Graph, node: ir.Node, weight: _Weight, magnitudes: Callable[[], NDArray[np.float32]]
) -> ir.Value:
    """Rounds the weight of `node` and returns it as floats again; `magnitudes` become the largest number."""
    name, per_channel = f"{weight.name}.{weight.numbers.name}", weight.numbers.per_channel
    low = ir.LazyTensor(
        lambda: ir.Tensor(weight.rounded(magnitudes()), dtype=weight.numbers.dtype),
        dtype=weight.numbers.dtype,
        shape=ir.Shape(weight.shape),
        name=name,
    )
    scales = ir.LazyTensor(
        lambda: ir.Tensor(weight.scale(magnitudes()), dtype=weight.floats),
        dtype=weight.floats,
        shape=ir.Shape([weight.shape[weight.axis]] if per_channel else []),
        name=f"{name}.scale",
    )
    inputs = [initializer(graph, low), initializer(graph, scales)]
    axis = {"axis": weight.axis} if per_channel else {}
    back = ir.node("DequantizeLinear", inputs, axis, name=f"{name}/DequantizeLinear")
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
