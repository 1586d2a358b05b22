"""Computes 3x3 convolutions with fewer matrix products, after Winograd (Lavin and Gray 2015, arXiv:1509.09308).

The image is cut into tiles of 4x4 results, each computed from 6x6 pixels. A transformed tile takes 36 products over
channels instead of 144 (a tile of 2x2 results: 16 instead of 36). If the image was doubled before (nearest neighbour),
25 (9) remain: the others are zero because pairs of pixels are equal. In fp32 the error is about 1e-5 of the largest
value.
"""

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from .exact_simplifications import derived_weight, remove_unused, weight_shape
from .node_helpers import Rewriting
from .upsampling import cut_result, find_doublings, is_plain_convolution

MIN_CHANNELS = 128
"""Least number of input and of output channels. With 64, the transforms make a convolution slower."""
LARGE = 1920 * 640
"""Input times output channels above which tiles are 2x2: weights grow by 1.8 instead of 4 times with 4x4 tiles."""

Matrix = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Filtering:
    """Minimal filtering along one axis, at the points 0, 1, -1 (and 2, -2) and infinity, in this order.

    Attributes:
        pixels: [products, pixels], from the pixels under a tile to one factor; the first pixel is before the tile.
        taps: [products, 3], from a kernel's taps to the other factor.
        results: [tile, products], from the products to the tile's results.
        step: pixels from tile to tile.
    """

    pixels: Matrix
    taps: Matrix
    results: Matrix
    step: int

    @property
    def tile(self) -> int:
        """Number of results of a tile."""
        return len(self.results)

    def doubled(self) -> "Filtering":
        """Returns the same filtering of a doubled image, computed from the pixels before the doubling."""
        pairs = (np.arange(self.tile + 2) + 1) // 2
        pixels = self.pixels @ np.eye(self.tile // 2 + 2)[pairs]
        kept = pixels.any(axis=1)
        return Filtering(pixels[kept], self.taps[kept], self.results[:, kept], self.tile // 2)


F2 = Filtering(
    pixels=np.array([(1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1)], float),
    taps=np.array([(2, 0, 0), (1, 1, 1), (1, -1, 1), (0, 0, 2)]) / 2,
    results=np.array([(1, 1, 1, 0), (0, 1, -1, -1)], float),
    step=2,
)
F4 = Filtering(
    pixels=np.array(
        [
            (4, 0, -5, 0, 1, 0),
            (0, -4, -4, 1, 1, 0),
            (0, 4, -4, -1, 1, 0),
            (0, -2, -1, 2, 1, 0),
            (0, 2, -1, -2, 1, 0),
            (0, 4, 0, -5, 0, 1),
        ],
        float,
    ),
    taps=np.array([(6, 0, 0), (-4, -4, -4), (-4, 4, -4), (1, 2, 4), (1, -2, 4), (0, 0, 24)]) / 24,
    results=np.array([(1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1)], float),
    step=4,
)
_BIASED = 1
"""Row and column of the product that adds to every result with factor 1: it gets the bias."""


def filter_convolutions(model: ir.Model) -> int:
    """Rewrites every 3x3 convolution with enough channels, with a doubling before it; returns how many."""
    doubled = {doubling.convolution: doubling for doubling in find_doublings(model)}
    plain = [node for node in model.graph if is_plain_convolution(node)]
    found = [node for node in plain if min(_channels(node)) >= MIN_CHANNELS]
    for convolution in found:
        doubling = doubled.get(convolution)
        form = F4 if math.prod(_channels(convolution)) <= LARGE else F2
        rewrite = _Rewrite(model.graph, convolution, form.doubled() if doubling else form)
        result = rewrite.run(doubling.source if doubling else convolution.inputs[0])
        rewrite.replace(convolution, cut_result(rewrite, doubling, result) if doubling else result)
    remove_unused(model, found)
    return len(found)


def _channels(convolution: ir.Node) -> tuple[int, int]:
    """Returns the output and input channels."""
    outputs, inputs, *_ = weight_shape(convolution.inputs[1])
    return outputs, inputs


class _Rewrite(Rewriting):
    """Rewrites one convolution.

    In shapes, T is the number of tiles of all images, and L a tile's pixels along an axis. P and R are the products and
    results of a tile, C and K the input and output channels.
    """

    def __init__(self, graph: ir.Graph, convolution: ir.Node, form: Filtering) -> None:
        super().__init__(graph, f"{convolution.name or convolution.outputs[0].name}.winograd")
        self.convolution = convolution
        self.form = form

    def run(self, source: ir.Value | None) -> ir.Value:
        """Returns [N, K, H, W] for [N, C, H, W] (half the size before a doubling), for any size."""
        outputs, inputs = _channels(self.convolution)
        count, height, width = self.sizes(source)
        down, across = self.tiles(height), self.tiles(width)
        places = self.places(count, height, width, down, across)

        flat = self.op("Reshape", source, self.integers(0, inputs, 1, -1))  # OpenVINO transposes this twice as fast
        rows = self.op("Reshape", self.op("Transpose", flat, perm=[0, 3, 1, 2]), self.integers(-1, inputs))
        rows = self.op("Pad", rows, self.integers(0, 0, 1, 0))  # [N*H*W + 1, C], the last one the border
        pixels = self.transform(self.form.pixels, self.op("Gather", rows, places, axis=0), inputs)  # [P, T, C]
        results = self.transform(self.form.results, self.multiply(pixels), outputs)  # [R, T, K]

        tile, channels = self.integers(self.form.tile), self.integers(outputs)
        tiled = self.op("Reshape", results, self.join(tile, tile, count, down, across, channels))
        size = self.join(count, self.op("Mul", down, tile), self.op("Mul", across, tile), channels)
        image = self.op("Reshape", self.op("Transpose", tiled, perm=[2, 3, 0, 4, 1, 5]), size)
        return self.op("Transpose", self.cropped(image, height, width), perm=[0, 3, 1, 2])

    def cropped(self, image: ir.Value, height: ir.Value, width: ir.Value) -> ir.Value:
        """Returns [N, H, W, K] without the parts of tiles beyond the border."""
        ends = self.op("Mul", self.join(height, width), self.integers(self.form.tile // self.form.step))
        return self.op("Slice", image, self.integers(0, 0), ends, self.integers(1, 2))

    def sizes(self, source: ir.Value | None) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Returns N, H and W, each as a vector of one element."""
        count, _, height, width = self.split(self.op("Shape", source), 4)
        return count, height, width

    def tiles(self, size: ir.Value) -> ir.Value:
        """Returns the number of tiles along an axis, including a partial last one."""
        step = self.form.step
        return self.op("Div", self.op("Add", size, self.integers(step - 1)), self.integers(step))

    def places(self, count: ir.Value, height: ir.Value, width: ir.Value, down: ir.Value, across: ir.Value) -> ir.Value:
        """Returns the row numbers [L*L, T] of the pixels under each tile; beyond the border, the last row."""
        image = self.op("Mul", height, width)
        border = self.op("Mul", count, image)
        images = self.op("Mul", self.range(count), image)
        lines = self.op("Mul", self.along(down, height, border), width)  # large beyond the border
        columns = self.along(across, width, border)
        parts = [  # [L, L, N, down, across]
            self.op("Unsqueeze", images, self.integers(0, 1, 3, 4)),
            self.op("Unsqueeze", lines, self.integers(1, 2, 4)),
            self.op("Unsqueeze", columns, self.integers(0, 2, 3)),
        ]
        rows = self.op("Add", self.op("Add", parts[0], parts[1]), parts[2])
        return self.op("Reshape", self.op("Min", rows, border), self.integers(self.form.pixels.shape[1] ** 2, -1))

    def along(self, tiles: ir.Value, size: ir.Value, border: ir.Value) -> ir.Value:
        """Returns the places [L, tiles] of each tile's pixels along an axis; `border` if outside the image."""
        offsets = self.constant(np.arange(self.form.pixels.shape[1], dtype=np.int64)[:, None] - 1)
        places = self.op("Add", self.op("Mul", self.range(tiles), self.integers(self.form.step)), offsets)
        inside = self.op("And", self.op("GreaterOrEqual", places, self.integers(0)), self.op("Less", places, size))
        return self.op("Where", inside, places, border)

    def transform(self, matrix: Matrix, values: ir.Value, channels: int) -> ir.Value:
        """Transforms both axes of a tile, which are flattened in the first axis of `values`."""
        both = np.kron(matrix, matrix).astype(np.float32)
        after, before = both.shape
        flat = self.op("Reshape", values, self.integers(before, -1))
        transformed = self.op("MatMul", self.constant(both), flat)
        return self.op("Reshape", transformed, self.integers(after, -1, channels))

    def multiply(self, pixels: ir.Value) -> ir.Value:
        """Multiplies over channels. Each product has its own weights, which a backend can pack."""
        along = len(self.form.taps)
        products = []
        for index, part in enumerate(self.split(pixels, along**2)):
            row, column = divmod(index, along)
            product = self.op("MatMul", part, self.kernel(row, column))
            if row == column == _BIASED and len(self.convolution.inputs) > 2:
                product = self.op("Add", product, self.convolution.inputs[2])
            products.append(product)
        return self.join(*products)

    def kernel(self, row: int, column: int) -> ir.Value:
        """Returns the weights [C, K] of one product."""
        outputs, inputs = _channels(self.convolution)
        across = np.outer(self.form.taps[row], self.form.taps[column])

        def transformed(weight: NDArray[np.float32]) -> NDArray[np.float32]:
            return np.ascontiguousarray(np.einsum("kchw,hw->ck", weight, across), np.float32)

        return derived_weight(self.graph, self.convolution.inputs[1], f"{row}{column}", (inputs, outputs), transformed)

    def range(self, count: ir.Value) -> ir.Value:
        scalar = self.op("Squeeze", count, self.integers(0))
        return self.op("Range", self.constant(np.int64(0)), scalar, self.constant(np.int64(1)))
