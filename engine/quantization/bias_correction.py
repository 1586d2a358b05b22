"""Takes the mean error of rounded weights out of results (bias correction, Nagel et al. 2019, arXiv:1906.04721).

What comes into a layer has a mean of its own in each channel: behind SiLU, norms and attention it makes more than half
of the square of the values. Through the rounding error of the weight it adds the same offset to all pixels and frames,
apart from the borders of a convolution. The offset is known when the weight is rounded, and the layer's bias makes up
for it.
"""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ..rewrites.node_helpers import hand_over, initializer
from .layers import output_axis, weight_shape

Vector = Callable[[], NDArray[np.float32]]


def subtract(graph: ir.Graph, node: ir.Node, error: Vector, dtype: ir.DataType, suffix: str) -> None:
    """Subtracts a vector from the result of a layer: in its bias, or in a new one.

    Args:
        graph: the graph of the layer.
        node: the layer, a product or a convolution. The Add that takes its result has its bias, if that is a constant.
        error: gives the vector, fp32 [out]. It is called when the graph is written.
        dtype: of a new bias.
        suffix: of its name.
    """
    place = _bias(node, graph)
    bias = place[0].inputs[place[1]] if place is not None else None
    known = bias.const_value if bias is not None else None
    dtype = ir.DataType(known.dtype) if known is not None else dtype

    def corrected() -> ir.Tensor:
        before = known.numpy().astype(np.float32) if known is not None else np.float32(0)
        return ir.Tensor(np.asarray(before - error(), dtype.numpy()), dtype=dtype)

    shape = ir.Shape([weight_shape(node)[output_axis(node)]])
    name = f"{node.name}.bias.{suffix}"
    value = initializer(graph, ir.LazyTensor(corrected, dtype=dtype, shape=shape, name=name, cache=True))
    if place is not None:
        place[0].replace_input_with(place[1], value)
    elif node.op_type == "Conv":
        node.resize_inputs(3)
        node.replace_input_with(2, value)
    else:
        _add(graph, node, value)


def _bias(node: ir.Node, graph: ir.Graph) -> tuple[ir.Node, int] | None:
    """Returns the node that takes the bias of a layer, and the index among its inputs."""
    if node.op_type == "Conv":
        return (node, 2) if len(node.inputs) > 2 and node.inputs[2] is not None else None
    uses = list(node.outputs[0].uses())
    if any(output is node.outputs[0] for output in graph.outputs) or len(uses) != 1 or uses[0].node.op_type != "Add":
        return None
    other = uses[0].node.inputs[1 - uses[0].idx]
    constant = other.const_value if other is not None else None
    return (uses[0].node, 1 - uses[0].idx) if constant is not None and len(constant.shape) == 1 else None


def _add(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """Adds a vector to the result of a product that has no bias."""
    result = node.outputs[0]
    uses = list(result.uses())
    addition = ir.node("Add", [result, value], name=f"{node.name}.bias/Add")
    graph.insert_after(node, addition)
    hand_over(graph, result, addition.outputs[0], uses)
