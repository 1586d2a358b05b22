"""The UNet's upsamplers for latents of any size."""

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from diffusers.models.upsampling import Upsample2D
from torch import nn


class Upsampler(nn.Module):
    """Doubles an image, cuts it to the size of the next skip connection, and convolves it.

    A downsampler halves a side and rounds up, so the skip connection's sides are 2n or 2n-1. diffusers interpolates to
    that size with the nearest neighbour, which gives the same pixels. A doubling of its own keeps the pattern that
    rewrites of engines look for, and at 2n there is nothing to cut.
    """

    def __init__(self, source: Upsample2D) -> None:
        super().__init__()
        self.conv = source.conv

    def forward(self, hidden_states: torch.Tensor, output_size: tuple[int, int]) -> torch.Tensor:
        """Maps [N, C, h, w] to [N, C, *output_size]; each side of `output_size` is twice the input's, or one less."""
        height, width = output_size
        doubled = F.interpolate(hidden_states, scale_factor=2.0, mode="nearest")
        convolved: torch.Tensor = self.conv(doubled[:, :, :height, :width])
        return convolved


def merge_cuts(graph: ir.Graph) -> None:
    """Makes one Slice of the two that the tracer writes for `[:, :, :height, :width]`: each would copy the image."""
    for columns in list(graph):
        rows = columns.inputs[0].producer() if _cuts(columns, axis=3) and columns.inputs[0] is not None else None
        if rows is None or not _cuts(rows, axis=2) or len(rows.outputs[0].uses()) != 1:
            continue
        ends = ir.node("Concat", [rows.inputs[2], columns.inputs[2]], {"axis": 0})
        starts, axes, steps = (_integers(values) for values in ((0, 0), (2, 3), (1, 1)))
        inputs = [rows.inputs[0], starts.outputs[0], ends.outputs[0], axes.outputs[0], steps.outputs[0]]
        cut = ir.node("Slice", inputs)
        for node in (starts, axes, steps, ends, cut):
            node.metadata_props.update(columns.metadata_props)
        graph.insert_before(columns, [starts, axes, steps, ends, cut])
        columns.outputs[0].replace_all_uses_with(cut.outputs[0])
        graph.remove(columns, safe=True)
        graph.remove(rows, safe=True)


def _cuts(node: ir.Node, axis: int) -> bool:
    """Whether a node is a Slice along this axis alone, from the start, without gaps."""
    if node.op_type != "Slice" or len(node.inputs) != 5:  # axes and steps are optional
        return False
    starts, _, axes, steps = (_constant(value) for value in node.inputs[1:])
    return (starts, axes, steps) == ([0], [axis], [1])


def _constant(value: ir.Value | None) -> list[int] | None:
    """Returns a constant vector of integers; None if the value is not constant."""
    while value is not None and (maker := value.producer()) and maker.op_type in ("Cast", "Reshape"):
        value = maker.inputs[0]
    tensor = ir.convenience.get_const_tensor(value, propagate_shape_type=False) if value is not None else None
    return None if tensor is None else np.atleast_1d(tensor.numpy()).tolist()


def _integers(values: tuple[int, ...]) -> ir.Node:
    """Returns a node that gives a constant vector."""
    return ir.node("Constant", [], {"value": ir.tensor(values, dtype=ir.DataType.INT64)})
