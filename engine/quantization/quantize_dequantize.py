"""Rounds matrix layers to 8 bits with QuantizeLinear and DequantizeLinear.

Weights have a scale per output channel or one for the layers with the same input, activations one per tensor. Both are
symmetric, but for activations that are hardly below zero. A library that finds the pair before a layer multiplies 8
bits by 8 bits. Everything else keeps its type in the graph.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Self

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ..rewrites.node_helpers import initializer, insert_behind
from . import bias_correction
from .layers import input_axis, layer_input, layer_weight, output_axis, quantizable
from .number_formats import NumberFormat, scale_and_zero

_SMALLEST_FP16 = float(np.finfo(np.float16).tiny)


@dataclass(frozen=True, slots=True)
class InputRounding:
    """How the input of a layer is rounded.

    Attributes:
        magnitude: the magnitude that becomes the largest number.
        smallest: the smallest value of an input that becomes unsigned integers with a zero point; None if it is signed.
        means: the mean of each of the C channels, fp32 [C]. The offset that it causes through the rounding error of the
            weight is subtracted from the result (`bias_correction`). None leaves it.
    """

    magnitude: float
    smallest: float | None = None
    means: NDArray[np.float32] | None = None


def quantize(model: ir.Model, inputs: Mapping[str, InputRounding], numbers: NumberFormat) -> int:
    """Rounds every matrix layer whose input's rounding is known, in place; returns how many.

    Args:
        model: a typed graph. The scales get the type of a layer's weight.
        inputs: how the input of each layer is rounded, by the layer's name. Layers with the same input have the same.
        numbers: the format.
    """
    layers: dict[ir.Value, list[ir.Node]] = {}
    for node in quantizable(model):
        if node.name in inputs:
            layers.setdefault(layer_input(node), []).append(node)
    for nodes in layers.values():
        rounding = inputs[nodes[0].name or ""]
        weights = [_Weight.of(node, numbers) for node in nodes]
        largest = None if numbers.per_channel else cache(partial(_largest, weights))
        rounded = _activation(model.graph, nodes[0], rounding, numbers)
        for node, weight in zip(nodes, weights, strict=True):
            magnitudes = largest or cache(weight.magnitudes)
            if rounding.means is not None:
                error = partial(_mean_error, weight, magnitudes, input_axis(node), rounding.means)
                bias_correction.subtract(model.graph, node, error, weight.floats, numbers.name)
            node.replace_input_with(0, rounded)
            node.replace_input_with(1, _rounded_weight(model.graph, node, weight, magnitudes))
    for name in [name for name, value in model.graph.initializers.items() if not value.uses()]:
        del model.graph.initializers[name]
    return sum(map(len, layers.values()))


def _activation(graph: ir.Graph, node: ir.Node, rounding: InputRounding, numbers: NumberFormat) -> ir.Value:
    """Rounds the input of `node` and returns it as floats again."""
    source, floats = layer_input(node), _type(layer_weight(node))
    scale: NDArray[np.float32] = numbers.scale(rounding.magnitude)
    zero: NDArray[np.generic] = numbers.round(np.zeros(()))
    if rounding.smallest is not None:
        scale, zero = scale_and_zero(rounding.magnitude, rounding.smallest)
    name = f"{source.name}.{numbers.name}"
    scales = initializer(graph, ir.Tensor(_in(floats, scale), dtype=floats, name=f"{name}.scale"))
    zeros = initializer(graph, ir.Tensor(zero, dtype=ir.DataType.from_numpy(zero.dtype), name=f"{name}.zero"))
    down = ir.node("QuantizeLinear", [source, scales, zeros], name=f"{name}/QuantizeLinear")
    up = ir.node("DequantizeLinear", [down.outputs[0], scales, zeros], name=f"{name}/DequantizeLinear")
    down.outputs[0].name, up.outputs[0].name = name, f"{name}.values"
    insert_behind(graph, source, down, up)
    return up.outputs[0]


@dataclass(frozen=True, slots=True)
class _Weight:
    """The weight of a layer before it is rounded.

    Attributes:
        name: of the weight.
        tensor: its values.
        numbers: the format that it is rounded to.
        floats: the type that its layer computes in when it is not quantized.
        axis: of its output channels.
    """

    name: str
    tensor: ir.TensorProtocol
    numbers: NumberFormat
    floats: ir.DataType
    axis: int

    @classmethod
    def of(cls, node: ir.Node, numbers: NumberFormat) -> Self:
        weight = layer_weight(node)
        assert weight.const_value is not None
        return cls(str(weight.name), weight.const_value, numbers, _type(weight), output_axis(node))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape.numpy())

    def values(self) -> NDArray[np.float32]:
        """The exact values."""
        return np.asarray(self.tensor.numpy(), np.float32)

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
        """How far the rounded weight is from the exact one."""
        return np.asarray(self.rounded(magnitudes).astype(np.float32) * self._scale(magnitudes) - self.values())

    def _scale(self, magnitudes: NDArray[np.float32]) -> NDArray[np.float32]:
        scale = self.scale(magnitudes).astype(np.float32)
        return along(scale, self.axis, len(self.shape)) if scale.ndim else scale


def _largest(weights: Iterable[_Weight]) -> NDArray[np.float32]:
    """Returns the largest magnitude of all weights."""
    return np.asarray(max(weight.magnitudes().max() for weight in weights))


def _mean_error(
    weight: _Weight, magnitudes: Callable[[], NDArray[np.float32]], axis: int, means: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Returns how far a layer's result is off if its input is everywhere its mean, fp32 [out]."""
    error = weight.error(magnitudes()) * along(means, axis, len(weight.shape))
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


def along(values: NDArray[np.float32], axis: int, dimensions: int) -> NDArray[np.float32]:
    """Returns a row of values in the shape that runs along one axis of an array."""
    return values.reshape([-1 if index == axis else 1 for index in range(dimensions)])


def _type(weight: ir.Value) -> ir.DataType:
    """Returns the type that a layer computes in when it is not quantized."""
    assert weight.const_value is not None
    return ir.DataType(weight.const_value.dtype)


def _in(floats: ir.DataType, scale: NDArray[np.float32]) -> NDArray[np.floating]:
    """Returns a scale in a type; in fp16 at least the smallest number of full precision."""
    return np.maximum(scale, _SMALLEST_FP16 if floats == ir.DataType.FLOAT16 else 0).astype(floats.numpy())
