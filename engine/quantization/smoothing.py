"""Moves differences between channels from activations into weights (SmoothQuant, Xiao et al. 2022, arXiv:2211.10438).

A rounded activation has one scale for all its channels, so one channel with large values makes all others coarse. Here
each channel is divided by a factor of its own, and the weight is multiplied by it: the product stays the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from .layers import input_axis, is_silu, layer_input, layer_weight, quantizable
from .observer import Statistics

Floats = NDArray[np.float32]

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


@dataclass(frozen=True, slots=True)
class InputRounding:
    """How the input of a layer is rounded.

    Attributes:
        magnitude: the magnitude that becomes the largest number, after the division.
        divisors: what each of the C channels is divided by, fp32 [C].
        smallest: the smallest value after the division, if it is nearer to zero than `-magnitude`.
    """

    magnitude: float
    divisors: Floats
    smallest: float | None = None


def smooth(
    model: ir.Model, statistics: Mapping[str, Statistics], strength: float = STRENGTH
) -> dict[str, InputRounding]:
    """Returns how the input of each layer is rounded, by the layer's name. Layers with the same input share it.

    Args:
        model: the graph that is to be quantized.
        statistics: what came into each layer, by the layer's name. Layers without are left out.
        strength: how far differences move, 0 to 1.
    """
    layers: dict[ir.Value, list[ir.Node]] = {}
    for node in quantizable(model):
        if node.name in statistics:
            layers.setdefault(layer_input(node), []).append(node)
    found = {}
    for source, nodes in layers.items():
        seen = statistics[nodes[0].name or ""].channels
        divisors = _divisors(seen, np.max([_largest_by_input(node) for node in nodes], axis=0), strength)
        magnitude = HEADROOM * float((seen / divisors).max())
        smallest = _SILU_MINIMUM / float(divisors.min()) if is_silu(source) else -magnitude
        rounding = InputRounding(magnitude, divisors, smallest if smallest > -magnitude else None)
        found.update({node.name or "": rounding for node in nodes})
    return found


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
