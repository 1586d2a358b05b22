"""Asks TensorRT to add the products of fp16 layers in fp32.

TensorRT may sum fp16 products in fp16 and chooses by speed alone. A layer whose operands are cast to fp32 just before
it, and whose result is cast back just after it, has to be summed in fp32. TensorRT-RTX makes one kernel of casts and
layer, which still reads and writes fp16 (NVIDIA's Torch-TensorRT relies on this pattern for products: `use_fp32_acc`).
Whether TensorRT does the same with convolutions needs a GPU to see; a build warns if they became fp32. A bias
within the pattern belongs to a convolution. That of a product has to follow the cast back: otherwise the whole product
is computed in fp32.
"""

import math
from collections.abc import Iterator

import onnx_ir as ir

from .node_helpers import cast

LONG_SUM = 256
"""The shortest sum that is asked for in fp32: 16 steps of a tensor core, which adds blocks of 16."""
_LOW = ir.DataType.FLOAT16
_HIGH = ir.DataType.FLOAT


def accumulate_in_fp32(model: ir.Model, shortest: int = LONG_SUM) -> int:
    """Puts casts around products and convolutions with fp16 weights, in place; weights stay fp16 and keep their names.

    Each layer has casts of its own: around a shared one TensorRT writes the activation in fp32. These layers stay as
    they are: sums shorter than `shortest`, products of two activations, `Gemm`, which has its bias within and computes
    the embedding of one timestep, and convolutions of single pixels, which TensorRT-RTX 1.7 then gives fp32 inputs.
    bf16 is always added in fp32. Layers in fp8 are left to TensorRT, whose kernels for them are named in no report.

    Args:
        model: a typed graph in fp16.
        shortest: number of products in the shortest sum that is asked for in fp32.

    Returns:
        the number of layers with casts around them.
    """
    layers = list(_long_sums(model.graph, shortest))
    for node in layers:
        for place, value in enumerate(node.inputs):
            if value is not None:
                node.replace_input_with(place, _widened(model.graph, node, place, value))
        _narrow_result(model.graph, node)
    return len(layers)


def sum_length(node: ir.Node) -> int:
    """How many products each result of a layer adds; 0 without a constant weight, and for other operators.

    Counted are MatMul, Conv of several pixels, and ConvTranspose, of whose kernel [inputs, outputs, ...] each result
    takes every stride-th row and column.
    """
    weight = node.inputs[1].const_value if len(node.inputs) > 1 and node.inputs[1] is not None else None
    if weight is None or node.op_type not in ("MatMul", "Conv", "ConvTranspose"):
        return 0
    sides = weight.shape.numpy()
    if node.op_type == "MatMul":
        return int(sides[-2]) if len(sides) > 1 else 0
    if node.op_type == "ConvTranspose":
        strides = node.attributes["strides"].as_ints() if "strides" in node.attributes else (1,)
        return int(math.prod(sides) // sides[1] // math.prod(strides))
    return 0 if math.prod(sides[2:]) == 1 else int(math.prod(sides[1:]))


def _long_sums(graph: ir.Graph, shortest: int) -> Iterator[ir.Node]:
    for node in graph:
        if sum_length(node) >= shortest and node.inputs[1].const_value.dtype == _LOW:
            yield node


def _widened(graph: ir.Graph, node: ir.Node, place: int, value: ir.Value) -> ir.Value:
    """Returns an input of `node` in fp32, by a cast before it."""
    widening = cast(value, _HIGH, f"{node.name}.input{place}")
    widening.outputs[0].dtype = _HIGH
    graph.insert_before(node, widening)
    return widening.outputs[0]


def _narrow_result(graph: ir.Graph, node: ir.Node) -> None:
    """Casts the result of `node` back to fp16 under its old name, and gives it to all who took it."""
    result = node.outputs[0]
    name, shape = result.name, result.shape
    uses, places = list(result.uses()), [place for place, value in enumerate(graph.outputs) if value is result]
    result.name, result.dtype = f"{name}.sum", _HIGH
    narrowing = cast(result, _LOW, f"{node.name}.output")
    graph.insert_after(node, narrowing)
    narrow = narrowing.outputs[0]
    narrow.name, narrow.shape, narrow.dtype = name, shape, _LOW
    for use in uses:
        use.node.replace_input_with(use.idx, narrow)
    for place in places:
        graph.outputs[place] = narrow
