"""Doublings (nearest neighbour) before 3x3 convolutions, which the UNet cuts to the size of a skip connection.

A side of n becomes 2n, or 2n-1 if the skip connection's side was odd. The folded form of doubling and convolution
computes 2n. Where a row or column was cut, the pixels beside it have another neighbour: a zero, as at any border.
`cut_result` computes those pixels alone. At 2n they have size zero, and a backend that knows the shapes drops them.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ...runtime.format.manifest import ceil_div
from .exact_simplifications import derived_weight, remove_unused, weight_shape
from .node_helpers import Rewriting

_TAPS = ({0: (0,), 1: (1, 2)}, {0: (0, 1), 1: (2,)})
"""The taps of a 3-tap kernel that read each of two original pixels, at even and odd places of the doubled image."""
_SPREAD = np.array([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], np.float32)
"""What each tap of a transposed convolution adds up of the 3 taps of a convolution after a doubling."""
_DOUBLING = {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}
_CONVOLUTION = {"pads": (1, 1, 1, 1), "strides": (1, 1), "dilations": (1, 1), "group": 1}
"""Attributes, as exported, of a convolution that can be folded."""
_END = 2**62
_ROWS, _COLUMNS = 2, 3
"""Axes of [N, C, H, W]."""


@dataclass(frozen=True, slots=True)
class Doubling:
    """A doubling whose result feeds one 3x3 convolution and nothing else, and the cut between them, if there is one."""

    resize: ir.Node
    cut: ir.Node | None
    convolution: ir.Node

    @property
    def source(self) -> ir.Value | None:
        """The image before the doubling."""
        return self.resize.inputs[0]


def find_doublings(model: ir.Model) -> list[Doubling]:
    """Returns all doublings of a graph, in its order."""
    found = []
    for resize in model.graph:
        if not _doubles(resize):
            continue
        user = _only_user(resize)
        cut = user if user is not None and _cuts_the_end(user) else None
        user = _only_user(cut) if cut else user
        if user is not None and is_plain_convolution(user):
            found.append(Doubling(resize, cut, user))
    return found


def is_plain_convolution(node: ir.Node) -> bool:
    """Whether a node is a 3x3 convolution whose result is as large as its input."""
    if node.op_type != "Conv" or not _has(node, _CONVOLUTION):
        return False
    return weight_shape(node.inputs[1])[2:] == (3, 3)  # not every export writes the attribute kernel_shape


def drop_empty_cuts(model: ir.Model, height: int, width: int) -> int:
    """Removes the cuts that cut nothing from latents of this height and width; returns how many."""
    cuts = [doubling for doubling in find_doublings(model) if doubling.cut]
    dropped = []
    for level, doubling in enumerate(reversed(cuts)):  # the last one gives the size of the latents
        if doubling.cut and not any(ceil_div(side, 2**level) % 2 for side in (height, width)):
            doubling.cut.outputs[0].replace_all_uses_with(doubling.resize.outputs[0])
            dropped.append(doubling.cut)
    remove_unused(model, dropped)
    return len(dropped)


def fold_upsampling(model: ir.Model) -> int:
    """Replaces a doubling and its 3x3 convolution with four 2x2 convolutions at the small size; returns how many.

    It adds up taps that read copies of one pixel ahead of time: 4 products for each output instead of 9
    (Shi et al. 2016, arXiv:1609.07009).
    """
    found = find_doublings(model)
    for doubling in found:
        convolution = doubling.convolution
        name, biases = convolution.name or "", convolution.inputs[2:]
        phases = [
            ir.node(
                "Conv",
                [doubling.source, _phase(model.graph, convolution.inputs[1], row, column), *biases],
                {"pads": [1 - row, 1 - column, row, column], "kernel_shape": [2, 2]},
                name=f"{name}.{row}{column}",
            )
            for row in (0, 1)
            for column in (0, 1)
        ]
        joined = ir.node("Concat", [phase.outputs[0] for phase in phases], {"axis": 1}, name=f"{name}.phases")
        spread = ir.node("DepthToSpace", [joined.outputs[0]], {"blocksize": 2, "mode": "DCR"}, name=f"{name}.spread")
        border = Rewriting(model.graph, f"{name}.border")
        result = cut_result(border, doubling, spread.outputs[0])
        model.graph.insert_after(convolution, [*phases, joined, spread, *border.nodes])
        convolution.outputs[0].replace_all_uses_with(result)
    remove_unused(model, [doubling.resize for doubling in found])
    return len(found)


def transpose_upsampling(model: ir.Model) -> int:
    """Replaces a doubling and its 3x3 convolution with one transposed convolution; returns how many.

    Its 4x4 kernel with stride 2 takes 4 products for each output instead of 9, in one pass over memory. An image that
    is cut after its doubling is left: the transposed convolution would read what was cut.
    """
    found = [doubling for doubling in find_doublings(model) if doubling.cut is None]
    for doubling in found:
        convolution = doubling.convolution
        transposed = ir.node(
            "ConvTranspose",
            [doubling.source, _spread_weight(model.graph, convolution.inputs[1]), *convolution.inputs[2:]],
            {"kernel_shape": [4, 4], "strides": [2, 2], "pads": [1, 1, 1, 1]},
            name=(convolution.name or "").replace("Conv", "ConvTranspose"),
        )
        model.graph.insert_after(convolution, transposed)
        convolution.outputs[0].replace_all_uses_with(transposed.outputs[0], replace_graph_outputs=True)
    remove_unused(model, [doubling.resize for doubling in found])
    return len(found)


def _spread_weight(graph: ir.Graph, value: ir.Value | None) -> ir.Value:
    """Returns the kernel [inputs, outputs, 4, 4] of a transposed convolution for one of [outputs, inputs, 3, 3]."""
    outputs, inputs, *_ = weight_shape(value)

    def spread(array: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.ascontiguousarray(np.einsum("oirc,yr,xc->ioyx", array, _SPREAD, _SPREAD, optimize=True))

    return derived_weight(graph, value, "transposed", (inputs, outputs, 4, 4), spread)


def smallest_with_equal_cuts(model: ir.Model, side: int) -> int:
    """The smallest side of latents, at least 4, that is cut at the same doublings of a graph as `side`."""
    period: int = 2 ** sum(doubling.cut is not None for doubling in find_doublings(model))
    return side % period + period * max(ceil_div(4 - side % period, period), 0)


def cut_result(rewriting: Rewriting, doubling: Doubling, whole: ir.Value) -> ir.Value:
    """Returns the convolution of the cut image.

    Args:
        rewriting: gets the new nodes.
        doubling: what was rewritten.
        whole: the convolution of the doubled image without the cut.
    """
    if doubling.cut is None:
        return whole
    op, integers = rewriting.op, rewriting.integers
    size = doubling.cut.inputs[2]
    assert size is not None
    odd = op("Mod", size, integers(2, 2))  # 1 where a row or column was cut
    height, width = rewriting.split(size, 2)
    odd_height, odd_width = rewriting.split(odd, 2)
    even_height, even_width = rewriting.split(op("Sub", size, odd), 2)
    start, rows, columns = integers(0), integers(_ROWS), integers(_COLUMNS)

    inner = op("Slice", whole, integers(0, 0), rewriting.join(even_height, width), integers(_ROWS, _COLUMNS))
    last_row = op("Slice", _last(rewriting, doubling, _ROWS, width), start, odd_height, rows)
    upper = op("Slice", op("Concat", inner, last_row, axis=_ROWS), start, even_width, columns)
    last_column = op("Slice", _last(rewriting, doubling, _COLUMNS, height), start, odd_width, columns)
    return op("Concat", upper, last_column, axis=_COLUMNS)


def _last(rewriting: Rewriting, doubling: Doubling, axis: int, length: ir.Value) -> ir.Value:
    """Returns the last row or column of the result, with nothing beyond it.

    It reads two pixels across, which are one apart in the image before the doubling, and three along.

    Args:
        rewriting: gets the new nodes.
        doubling: what was rewritten.
        axis: `_ROWS` for the last row, `_COLUMNS` for the last column.
        length: of the row or column, after the cut.
    """
    op, integers = rewriting.op, rewriting.integers
    convolution, along = doubling.convolution, _ROWS + _COLUMNS - axis
    strip = op("Slice", doubling.source, integers(-2), integers(_END), integers(axis))  # one pixel if there is no more
    scales = np.ones(4, np.float32)
    scales[along] = 2
    doubled = op("Resize", strip, None, rewriting.constant(scales), **_DOUBLING)
    cut = op("Slice", doubled, integers(0), length, integers(along))

    def near(weight: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.ascontiguousarray(np.take(weight, (0, 1), axis))

    outputs, inputs, *_ = weight_shape(convolution.inputs[1])
    kernel, pads = ([2, 3], [1, 1, 0, 1]) if axis == _ROWS else ([3, 2], [1, 1, 1, 0])
    name = "last_row" if axis == _ROWS else "last_column"
    weight = derived_weight(rewriting.graph, convolution.inputs[1], name, (outputs, inputs, *kernel), near)
    convolved = op("Conv", cut, weight, *convolution.inputs[2:], kernel_shape=kernel, pads=pads)
    return op("Slice", convolved, integers(-1), integers(_END), integers(axis))


def _doubles(node: ir.Node) -> bool:
    """Whether a node doubles both sides of images."""
    if node.op_type != "Resize" or not _has(node, _DOUBLING):
        return False
    return _constant(node.inputs[2] if len(node.inputs) > 2 else None) == [1, 1, 2, 2]


def _cuts_the_end(node: ir.Node) -> bool:
    """Whether a node cuts the end of rows and columns, as the export writes it: by one at most."""
    if node.op_type != "Slice" or len(node.inputs) < 4:
        return False
    return (_constant(node.inputs[1]), _constant(node.inputs[3])) == ([0, 0], [_ROWS, _COLUMNS])


def _constant(value: ir.Value | None) -> object:
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return tensor.numpy().tolist() if tensor is not None else None


def _only_user(node: ir.Node) -> ir.Node | None:
    """Returns the only user of a node's result; None if there are several, or it is an output of the graph."""
    uses = list(node.outputs[0].uses())
    return uses[0].node if len(uses) == 1 and not node.outputs[0].is_graph_output() else None


def _has(node: ir.Node, attributes: Mapping[str, object]) -> bool:
    found = {name: node.attributes[name].value for name in attributes if name in node.attributes}
    return found == attributes


def _phase(graph: ir.Graph, value: ir.Value | None, row: int, column: int) -> ir.Value:
    """Returns the 2x2 kernel of the output pixels at `row` and `column` of each 2x2 block."""

    def phase(array: NDArray[np.float32]) -> NDArray[np.float32]:
        rows = np.stack([array[:, :, list(_TAPS[row][tap])].sum(2) for tap in (0, 1)], axis=2)
        return np.stack([rows[..., list(_TAPS[column][tap])].sum(3) for tap in (0, 1)], axis=3)

    outputs, inputs, *_ = weight_shape(value)
    return derived_weight(graph, value, f"{row}{column}", (outputs, inputs, 2, 2), phase)
