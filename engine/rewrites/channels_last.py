"""Keeps channels innermost in group norms and motion modules; convolutions and products on a CPU want that layout.

As exported, a group norm reshapes [N, C, H, W] to [N, groups, -1], and a motion module reshapes its frames to
[B, F, C, H*W]. A backend that keeps channels innermost transposes the whole image for each. Here a norm sums each
channel, which works in any layout, and combines those sums into the sums of the groups. A motion module swaps frames
and pixels as rows of channels.
"""

import re

import numpy as np
import onnx_ir as ir

from .exact_simplifications import remove_unused, weight_shape
from .group_norm import is_of_images, norms_over_frames, read_group_norm
from .node_helpers import Rewriting, only_user, producer

_ENTRANCE = re.compile(r"(?P<module>(^|.*\.)motion_modules\.\d+)\.proj_in/MatMul")
"""Matches the name of a motion module's first matrix product."""

Statistics = tuple[ir.Value, ir.Value]
"""The mean of each channel and the mean of its squares, each [N, C, 1, 1]."""


def norm_by_channels(model: ir.Model) -> int:
    """Computes the statistics of every group norm of images by channel; returns how many.

    The variance is E[x^2] - E[x]^2. Its error grows with the square of mean over deviation, and with the number of
    values that a backend adds one after the other. With channels innermost, OpenVINO adds all pixels of a reduction
    that way. So rows are summed first.
    """
    found = [node for node in model.graph if node.op_type == "InstanceNormalization" and is_of_images(node)]
    for instance in found:
        shifted = only_user(only_user(only_user(instance)))
        rewriting = _ChannelNorm(model.graph, shifted)
        source = rewriting.norm.split.inputs[0]
        rewriting.replace(shifted, rewriting.normalized(source, rewriting.statistics(source)))
    over_frames = norms_over_frames(model.graph)
    for shifted in over_frames:
        rewriting = _ChannelNorm(model.graph, shifted)
        source, layout = rewriting.norm.split.inputs
        statistics = rewriting.over_clip(rewriting.statistics(source), layout)
        rewriting.replace(shifted, rewriting.normalized(source, statistics))
    remove_unused(model, [*found, *over_frames])
    return len(found) + len(over_frames)


def turn_motion_modules(model: ir.Model) -> int:
    """Makes every motion module take and return its frames with channels innermost; returns how many.

    Its group norm, with statistics of each frame or of the clip, is also computed by channel.
    """
    found = [(node, match["module"]) for node in model.graph if (match := _ENTRANCE.match(node.name or ""))]
    for entrance, module in found:
        source = _turn_entrance(model.graph, entrance, module)
        (total,) = (use.node for use in source.uses() if (use.node.name or "").startswith(f"{module}/Add"))
        _turn_exit(model.graph, source, total)
    remove_unused(model, [entrance for entrance, _ in found])
    return len(found)


def _turn_entrance(graph: ir.Graph, entrance: ir.Node, module: str) -> ir.Value:
    """Turns frames [B*F, C, H, W] into the rows [B*H*W, F, C] that `entrance` takes; returns the frames."""
    rows = producer(entrance.inputs[0])
    before = producer(producer(rows.inputs[0]).inputs[0])  # over a clip [B, C, F, H*W], else [B, F, C, H*W]
    over_clip = before.op_type == "Add"
    rewriting = _ChannelNorm(graph, before if over_clip else producer(before.inputs[0]))
    head = rewriting.norm.split
    while ((earlier := producer(head.inputs[0])).name or "").startswith(f"{module}/"):
        head = earlier
    source = head.inputs[0]
    layout = (head if over_clip else before).inputs[1]  # [-1, F, C, H*W]
    assert source is not None
    statistics = rewriting.statistics(source)
    if over_clip:
        statistics = rewriting.over_clip(statistics, layout)
    normalized = rewriting.normalized(source, statistics)
    turn = Rewriting(graph, f"{rows.name}.turned")
    images = turn.op("Transpose", normalized, perm=[0, 2, 3, 1])
    clips = turn.op("Reshape", images, turn.picked(layout, 0, 1, 3, 2))
    turned = turn.op("Transpose", clips, perm=[0, 2, 1, 3])  # [B, H*W, F, C]
    graph.insert_before(rows, (*rewriting.nodes, *turn.nodes))
    rows.replace_input_with(0, turned)
    return source


def _turn_exit(graph: ir.Graph, source: ir.Value, total: ir.Node) -> None:
    """Turns rows [B, H*W, F, C] into the summand of the frames `source` [B*F, C, H, W]."""
    frames = producer(total.inputs[1])
    rows = producer(producer(frames.inputs[0]).inputs[0])
    turn = Rewriting(graph, f"{frames.name}.turned")
    clips = turn.op("Transpose", rows.outputs[0], perm=[0, 2, 1, 3])
    shape = turn.picked(turn.op("Shape", source), 0, 2, 3, 1)
    images = turn.op("Transpose", turn.op("Reshape", clips, shape), perm=[0, 3, 1, 2])
    graph.insert_before(total, turn.nodes)
    total.replace_input_with(1, images)


class _ChannelNorm(Rewriting):
    """A group norm of [N, C, H, W], computed from the statistics of its channels.

    Args:
        graph: the graph.
        shifted: the last node of the norm as it was exported.
    """

    def __init__(self, graph: ir.Graph, shifted: ir.Node) -> None:
        super().__init__(graph, f"{shifted.name}.channels")
        self.norm = read_group_norm(shifted)
        (self.channels,) = weight_shape(self.norm.weight)

    def statistics(self, source: ir.Value | None) -> Statistics:
        """Returns those of each image. Rows come first, by other operators than columns: OpenVINO merges equal ones."""
        columns, rows = self.integers(2), self.integers(3)
        width = self.op("Cast", self.op("Shape", source, start=3), to=ir.DataType.FLOAT)
        sums = self.op("ReduceSum", source, rows, keepdims=1)
        lengths = self.op("ReduceL2", source, rows, keepdims=1)  # reads once; Mul and ReduceSum would read twice
        mean, squares = (
            self.op("Div", self.op("ReduceMean", each, columns, keepdims=1), width)
            for each in (sums, self.op("Mul", lengths, lengths))
        )
        return mean, squares

    def over_clip(self, statistics: Statistics, layout: ir.Value | None) -> Statistics:
        """Returns the statistics of each clip, repeated for every frame; `layout` begins with [-1, F]."""
        frames, once = self.picked(layout, 1), self.integers(1)
        shape = self.join(self.integers(-1), frames, self.integers(self.channels))
        repeats = self.join(once, frames, once)
        mean, squares = (
            self.op("Tile", self.op("ReduceMean", self.op("Reshape", each, shape), once, keepdims=1), repeats)
            for each in statistics
        )
        return mean, squares

    def normalized(self, source: ir.Value | None, statistics: Statistics) -> ir.Value:
        """Normalizes `source` with one product and one sum."""
        size = self.channels // self.norm.groups
        grouped = [self.op("Reshape", each, self.integers(-1, self.norm.groups, size)) for each in statistics]
        mean, squares = (self.op("ReduceMean", each, self.integers(2), keepdims=1) for each in grouped)
        variance = self.op("Max", self.op("Sub", squares, self.op("Mul", mean, mean)), self.constant(np.float32(0)))
        deviation = self.op("Sqrt", self.op("Add", variance, self.constant(np.float32(self.norm.epsilon))))
        shape, image = self.integers(1, self.norm.groups, size), self.integers(-1, self.channels, 1, 1)
        factor = self.op("Div", self.op("Reshape", self.norm.weight, shape), deviation)
        summand = self.op("Sub", self.op("Reshape", self.norm.bias, shape), self.op("Mul", mean, factor))
        scaled = self.op("Mul", source, self.op("Reshape", factor, image))
        return self.op("Add", scaled, self.op("Reshape", summand, image))


def gain_and_shift(shifted: ir.Node) -> tuple[tuple[ir.Node, int], tuple[ir.Node, int]] | None:
    """Returns where a norm computed by channel takes its weight and its bias, each as a node and its input's index.

    Args:
        shifted: any sum. If it is not the last node of such a norm, the result is None.
    """
    scaled, summand = _before(shifted, 0, "Mul"), _before(shifted, 1, "Reshape")
    factor, difference = _before(_before(scaled, 1, "Reshape"), 0, "Div"), _before(summand, 0, "Sub")
    weight, bias = (_before(node, 0, "Reshape") for node in (factor, difference))
    if weight is None or bias is None or not all(_takes_vector(node) for node in (weight, bias)):
        return None
    return (weight, 0), (bias, 0)


def _before(node: ir.Node | None, index: int, operator: str) -> ir.Node | None:
    """Returns the node that computes an input of another, if it has this operator."""
    value = node.inputs[index] if node is not None else None
    before = value.producer() if value is not None else None
    return before if before is not None and before.op_type == operator else None


def _takes_vector(node: ir.Node) -> bool:
    value = node.inputs[0]
    return value is not None and value.const_value is not None and len(value.const_value.shape) == 1
