"""The numbers that a quantized layer multiplies: a scale times an integer, or times a small float."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class NumberFormat:
    """A symmetric format of 8 bits.

    Attributes:
        name: the precision's name; also the suffix of quantized values.
        dtype: the type in the graph.
        largest: the largest magnitude, which the scale maps the range to.
        per_channel: whether each output channel of a weight has a scale of its own, or all weights of the layers with
            the same input have one.
    """

    name: str
    dtype: ir.DataType
    largest: float
    per_channel: bool

    def scale(self, magnitude: Any) -> NDArray[np.float32]:
        """Returns the scale that maps these magnitudes, of any shape, to the largest number."""
        return np.asarray(np.maximum(magnitude, _SMALLEST) / self.largest, np.float32)

    def round(self, values: NDArray[Any]) -> NDArray[Any]:
        """Rounds values, already divided by their scale, to the nearest number; larger ones become the largest."""
        limited = np.clip(values, -self.largest, self.largest)
        return np.asarray(np.rint(limited) if self.dtype == ir.DataType.INT8 else limited, self.dtype.numpy())


def scale_and_zero(largest: float, smallest: float) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Returns scale and zero point of integers from 0 to 255 for values from `smallest`, below zero, to `largest`."""
    scale = (max(largest, _SMALLEST) - smallest) / 255
    return np.asarray(scale, np.float32), np.asarray(np.rint(-smallest / scale), np.uint8)


_SMALLEST = 1e-6
INT8 = NumberFormat("int8", ir.DataType.INT8, 127.0, per_channel=True)
"""Symmetric integers from -127 to 127 (Jacob et al. 2018, arXiv:1712.05877; arXiv:2004.09602)."""
E4M3 = NumberFormat("fp8", ir.DataType.FLOAT8E4M3FN, 448.0, per_channel=False)
"""Floats with 4 bits of exponent, 3 of mantissa and no infinity (Micikevicius et al. 2022, arXiv:2209.05433).

Each number has an exponent, so that a channel with small weights is as exact as one with large weights. With one scale
TensorRT makes factor, bias and rounding to fp16 part of the layer's kernel. With a scale for each channel they are a
further kernel, which reads the result in fp32.
"""
