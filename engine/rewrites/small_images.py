"""Lays small images side by side, so that a convolution reads its weight once for all of them.

OpenVINO computes a convolution image by image. The deepest level of a UNet has 2x2 pixels in clips of 128x128: each of
the 32 images reads a weight of 15 MB for 4 results per channel. Here all images become one wide image, with columns of
zeros between them that take the place of the padding; for a 1x1 convolution they become one high image.

The graph serves clips of any size, so that the number of images laid together is computed in it: all if they are
small, else one. A backend that knows the shapes when it compiles drops what then changes nothing.
"""

import onnx_ir as ir

from .exact_simplifications import weight_shape
from .node_helpers import Rewriting, hand_over


def join_small_images(model: ir.Model, most_pixels: int) -> int:
    """Lets square convolutions with padding for the same size compute small images at once; returns how many.

    Args:
        model: a typed graph, also with QuantizeLinear and DequantizeLinear before its convolutions: images are moved
            before they are rounded.
        most_pixels: the largest images that count as small.
    """
    groups: dict[tuple[ir.Value | None, bool, int], list[ir.Node]] = {}
    for node in model.graph:
        if _can_join(node):
            groups.setdefault((node.inputs[0], _kernel(node)[0] == 1, _stride(node)), []).append(node)
    return sum(_join(model.graph, nodes, most_pixels) for nodes in groups.values())


def _can_join(node: ir.Node) -> bool:
    if node.op_type != "Conv" or node.attributes.get_int("group", 1) != 1:
        return False
    rows, columns = _kernel(node)
    top, left, bottom, right = _integers(node, "pads", [0] * 4)
    stride, other = _integers(node, "strides", [1, 1])
    same = rows == columns == top + bottom + 1 == left + right + 1 and set(_integers(node, "dilations", [1])) == {1}
    return same and stride == other <= min(rows, 2) and left <= 1 and right <= 1


def _kernel(node: ir.Node) -> tuple[int, ...]:
    weight = node.inputs[1]
    assert weight is not None
    if weight.const_value is None:  # DequantizeLinear
        maker = weight.producer()
        assert maker is not None
        weight = maker.inputs[0]
    return weight_shape(weight)[2:]


def _integers(node: ir.Node, name: str, default: list[int]) -> list[int]:
    attribute = node.attributes.get(name)
    return list(attribute.as_ints()) if attribute is not None else default


def _stride(node: ir.Node) -> int:
    return _integers(node, "strides", [1, 1])[0]


def _takers(nodes: list[ir.Node]) -> list[ir.Node]:
    """Returns what takes the floats that come into convolutions: they themselves, or the node that rounds them.

    If others take the rounded values too, there is none.
    """
    value = nodes[0].inputs[0]
    back = value.producer() if value is not None else None
    if value is None or back is None or back.op_type != "DequantizeLinear":
        return nodes
    rounded = back.inputs[0]
    down = rounded.producer() if rounded is not None and len(rounded.uses()) == 1 else None
    return [down] if down is not None and {use.node for use in value.uses()} == set(nodes) else []


def _join(graph: ir.Graph, nodes: list[ir.Node], most_pixels: int) -> int:
    """Lets convolutions with the same input take joined images; returns how many.

    Channels stay innermost while images move, so that whole pixels are copied.
    """
    takers = _takers(nodes)
    if not takers:
        return 0
    source = takers[0].inputs[0]
    before = Rewriting(graph, f"{nodes[0].name}.joined")
    single = _kernel(nodes[0])[0] == 1
    layout = _Above(before, source, most_pixels) if single else _Beside(before, source, most_pixels, _stride(nodes[0]))
    joined = layout.join(before, before.op("Transpose", source, perm=[0, 2, 3, 1]))
    image = before.op("Transpose", joined, perm=[0, 3, 1, 2])
    graph.insert_before(takers[0], before.nodes)
    for taker in takers:
        taker.replace_input_with(0, image)
    for node in nodes:
        uses, after = list(node.outputs[0].uses()), Rewriting(graph, f"{node.name}.parted")
        parted = layout.part(after, after.op("Transpose", node.outputs[0], perm=[0, 2, 3, 1]))
        images = after.op("Transpose", parted, perm=[0, 3, 1, 2])
        graph.insert_after(node, after.nodes)
        hand_over(graph, node.outputs[0], images, uses)
    return len(nodes)


class _Above:
    """Images above each other, for a convolution that looks at single pixels.

    Args:
        rewriting: gets the nodes that compute shapes.
        source: images [N, C, H, W].
        most_pixels: the largest images that count as small.
    """

    def __init__(self, rewriting: Rewriting, source: ir.Value | None, most_pixels: int) -> None:
        shape = rewriting.op("Shape", source)
        self.images, self.height, self.width = (rewriting.picked(shape, place) for place in (0, 2, 3))
        pixels = rewriting.op("Mul", self.height, self.width)
        self.small = rewriting.op("LessOrEqual", pixels, rewriting.integers(most_pixels))
        self.together = rewriting.op("Where", self.small, self.images, rewriting.integers(1))
        self.groups = rewriting.op("Div", self.images, self.together)

    def join(self, rewriting: Rewriting, images: ir.Value) -> ir.Value:
        """Turns [N, H, W, C] into [groups, rows, W, C]."""
        channels = rewriting.op("Shape", images, start=3)
        rows = rewriting.op("Mul", self.together, self.height)
        return rewriting.op("Reshape", images, rewriting.join(self.groups, rows, self.width, channels))

    def part(self, rewriting: Rewriting, joined: ir.Value) -> ir.Value:
        """Turns the result [groups, rows, W, C] into [N, H, W, C]."""
        shape = rewriting.join(self.images, self.height, self.width, rewriting.integers(-1))
        return rewriting.op("Reshape", joined, shape)


class _Beside(_Above):
    """Images beside each other, each with columns of zeros behind it.

    Args:
        rewriting: gets the nodes that compute shapes.
        source: images [N, C, H, W].
        most_pixels: the largest images that count as small.
        stride: of the convolution. With 2, each image begins at an even column.
    """

    def __init__(self, rewriting: Rewriting, source: ir.Value | None, most_pixels: int, stride: int) -> None:
        super().__init__(rewriting, source, most_pixels)
        op, stride_, less = rewriting.op, rewriting.integers(stride), rewriting.integers(stride - 1)
        self.out_height, self.out_width = (
            op("Div", op("Add", side, less), stride_) for side in (self.height, self.width)
        )
        zeros = op("Sub", stride_, op("Mod", self.width, stride_))
        self.zeros = op("Where", self.small, zeros, rewriting.integers(0))

    def join(self, rewriting: Rewriting, images: ir.Value) -> ir.Value:
        """Turns [N, H, W, C] into [groups, H, columns, C]."""
        channels = rewriting.op("Shape", images, start=3)
        pads = rewriting.join(rewriting.integers(*[0] * 6), self.zeros, rewriting.integers(0))
        apart = rewriting.op("Pad", images, pads)
        shape = rewriting.join(self.groups, self.together, self.height, rewriting.integers(-1), channels)
        turned = rewriting.op("Transpose", rewriting.op("Reshape", apart, shape), perm=[0, 2, 1, 3, 4])
        return rewriting.op(
            "Reshape", turned, rewriting.join(self.groups, self.height, rewriting.integers(-1), channels)
        )

    def part(self, rewriting: Rewriting, joined: ir.Value) -> ir.Value:
        """Turns the result [groups, H, columns, C] into [N, H, W, C]."""
        channels, rest = rewriting.op("Shape", joined, start=3), rewriting.integers(-1)
        shape = rewriting.join(self.groups, self.out_height, self.together, rest, channels)
        turned = rewriting.op("Transpose", rewriting.op("Reshape", joined, shape), perm=[0, 2, 1, 3, 4])
        apart = rewriting.op("Reshape", turned, rewriting.join(self.images, self.out_height, rest, channels))
        return rewriting.op("Slice", apart, rewriting.integers(0), self.out_width, rewriting.integers(2))
