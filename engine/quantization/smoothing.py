"""Moves differences between channels from activations into weights (SmoothQuant, Xiao et al. 2022, arXiv:2211.10438).

A rounded activation has one scale for all its channels, so one channel with large values makes all others coarse. Here
each channel is divided by a factor of its own, and the weight is multiplied by it: the product stays the same.
"""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from .channel_division import Floats, divide_channels, multiply_constant, separate_slices
from .layers import input_axis, is_silu, layer_input, layer_weight, quantizable, weight_shape
from .observer import Statistics
from .quantize_dequantize import InputRounding, along

STRENGTH = 0.3
"""The paper's alpha: 0 moves nothing, 1 makes all channels of the activation equally large."""
HEADROOM = 1.1
"""Factor on the largest observed magnitude. Other requests have larger ones, which would be cut off: without headroom
single clips of the demo model lose up to 7 dB (docs/cpu.md).
"""
_SILU_MINIMUM = -0.2785
"""The smallest value of x * sigmoid(x)."""
_SMALLEST = 1e-5
"""Share of the largest channel; smaller ones count as this, so that an empty channel gets a finite factor."""


def smooth(
    model: ir.Model, statistics: Mapping[str, Statistics], strength: float = STRENGTH
) -> dict[str, InputRounding]:
    """Evens out the channels of the layers' inputs, in place. Layers with the same input share the divisors.

    Args:
        model: the graph that is to be quantized.
        statistics: what came into each layer, by the layer's name. Layers without stay as they are.
        strength: how far differences move, 0 to 1.

    Returns:
        How each layer's input is rounded then, by the layer's name: as unsigned numbers after SiLU.
    """
    layers: dict[ir.Value, list[ir.Node]] = {}
    for node in quantizable(model):
        if node.name in statistics:
            layers.setdefault(layer_input(node), []).append(node)
    seen = {source: statistics[nodes[0].name or ""] for source, nodes in layers.items()}
    weights = {source: np.max([_largest_by_input(node) for node in nodes], axis=0) for source, nodes in layers.items()}
    found = {}
    separate_slices(model.graph)
    for source, nodes in layers.items():
        divisors = _divisors(seen[source].channels, weights[source], strength)
        rounding = _rounding(seen[source], divisors, is_silu(source))
        found.update({node.name or "": rounding for node in nodes})
        divide_channels(model.graph, source, nodes, divisors)
        for node in nodes:
            factors = along(divisors, input_axis(node), len(weight_shape(node)))
            multiply_constant(model.graph, node, 1, factors, f"{node.name}.weight")
    return found


def _rounding(seen: Statistics, divisors: Floats, after_silu: bool) -> InputRounding:
    magnitude = HEADROOM * float((seen.channels / divisors).max())
    smallest = _SILU_MINIMUM / float(divisors.min())
    return InputRounding(
        magnitude,
        smallest if after_silu and smallest > -magnitude else None,
        seen.means / divisors if seen.means is not None else None,
    )


def _divisors(activation: Floats, weight: Floats, strength: float) -> Floats:
    """Returns a divisor for each channel, 1 in the geometric mean, from the largest magnitudes on both sides."""
    activation, weight = (np.maximum(side, max(_SMALLEST * float(side.max()), 1e-30)) for side in (activation, weight))
    logarithms = strength * np.log(activation) - (1 - strength) * np.log(weight)
    return np.asarray(np.exp(logarithms - logarithms.mean()), np.float32)


def _largest_by_input(node: ir.Node) -> Floats:
    """Returns the largest magnitude of a layer's weight for each input channel, fp32 [C]."""
    tensor = layer_weight(node).const_value
    assert tensor is not None
    weight = tensor.numpy()
    others = tuple(axis for axis in range(weight.ndim) if axis != input_axis(node))
    return np.asarray(np.abs(weight).max(axis=others), np.float32)
