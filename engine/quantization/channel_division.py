"""Divides the channels of a value by constants, without further work where the value is linear in some constants.

The gain and shift of a norm, the weight and bias of a product: dividing those in the graph divides the value. The
channels of an attention's result are those of its values, and the channels of a gated unit those of its linear half.
Elsewhere a product with the reciprocals is added.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ..rewrites.channels_last import gain_and_shift
from ..rewrites.node_helpers import initializer, insert_behind

Floats = NDArray[np.float32]

_SWAPS_HEADS = [0, 2, 1, 3]


@dataclass(frozen=True, slots=True)
class _Place:
    """A constant in whose last axis are the channels: an input of a node."""

    node: ir.Node
    index: int


def divide_channels(graph: ir.Graph, source: ir.Value, users: Collection[ir.Node], divisors: Floats) -> None:
    """Divides the first input of some nodes, in place.

    Args:
        graph: the graph.
        source: the value that they take.
        users: products, which take channels in the last axis, or convolutions, which take them in the second.
        divisors: of the C channels, fp32 [C].
    """
    reciprocals = np.asarray(1 / divisors, np.float32)
    last = all(user.op_type == "MatMul" for user in users)
    others = {use.node for use in source.uses()} - set(users)
    places = None if others or source.is_graph_output() else _of(source, last, len(divisors))
    if places is not None:
        for place in places:
            multiply_constant(graph, place.node, place.index, reciprocals, f"{place.node.name}.{place.index}.divided")
        return
    name = f"{source.name}.divided"
    column = reciprocals if last else reciprocals[:, None, None]
    factors = initializer(graph, ir.tensor(column, name=f"{name}.factors"))
    product = ir.node("Mul", [source, factors], name=f"{name}/Mul")
    product.outputs[0].name = name
    insert_behind(graph, source, product)
    for user in users:
        user.replace_input_with(0, product.outputs[0])


def separate_slices(graph: ir.Graph) -> None:
    """Gives each user of a cut constant a cut of its own: two attentions share the positions of a motion module."""
    for node in list(graph):
        cut, first = node.outputs[0], node.inputs[0] if node.inputs else None
        if node.op_type != "Slice" or first is None or first.const_value is None:
            continue
        for index, (user, place) in enumerate(list(cut.uses())[1:]):
            own = ir.node("Slice", node.inputs, name=f"{node.name}.{index}")
            graph.insert_after(node, own)
            user.replace_input_with(place, own.outputs[0])


def _of(value: ir.Value | None, last: bool, size: int) -> list[_Place] | None:
    """Returns constants whose division divides a value by the same, or None if there are none.

    Args:
        value: has one user, which is divided.
        last: whether its channels are in the last axis, or in the second of four.
        size: number of channels.
    """
    node = value.producer() if value is not None else None
    rule = _RULES.get(node.op_type) if node is not None else None
    return rule(node, last, size) if node is not None and rule is not None else None


def _of_layer_norm(node: ir.Node, last: bool, size: int) -> list[_Place] | None:
    return [_Place(node, index) for index in range(1, len(node.inputs))] if last else None


def _of_sum(node: ir.Node, last: bool, size: int) -> list[_Place] | None:
    """Returns the constants of both summands, or weight and bias of the group norm that the sum ends."""
    norm = None if last else gain_and_shift(node)
    if norm is not None:
        return [_Place(*place) for place in norm]
    first, second = (_either(node, index, last, size) for index in (0, 1))
    return [*first, *second] if first is not None and second is not None else None


def _of_product(node: ir.Node, last: bool, size: int) -> list[_Place] | None:
    return _either(node, 0, last, size) or _either(node, 1, last, size)


def _of_joined_heads(node: ir.Node, last: bool, size: int) -> list[_Place] | None:
    """Returns the constants for the values of the attention whose heads a Reshape puts beside each other."""
    swap = _only_maker(node.inputs[0], "Transpose") if last else None
    attention = _only_maker(swap.inputs[0], "Attention") if swap is not None else None
    own_swap = _only_maker(attention.inputs[2], "Transpose") if attention is not None else None
    split = _only_maker(own_swap.inputs[0], "Reshape") if own_swap is not None else None
    if swap is None or own_swap is None or split is None:
        return None
    swaps_heads = all(list(each.attributes["perm"].as_ints()) == _SWAPS_HEADS for each in (swap, own_swap))
    return _inside(split, 0, last, size) if swaps_heads else None


def _inside(node: ir.Node, index: int, last: bool, size: int) -> list[_Place] | None:
    """Returns the constants for an input of a node, if that is its only user."""
    value = node.inputs[index]
    return _of(value, last, size) if value is not None and _has_one_use(value) else None


def _either(node: ir.Node, index: int, last: bool, size: int) -> list[_Place] | None:
    """Returns an input itself if it is a constant with channels, else the constants inside."""
    value = node.inputs[index]
    if value is not None and value.const_value is not None:
        shape = value.const_value.shape
        return [_Place(node, index)] if last and len(shape) and shape[-1] == size else None
    return _inside(node, index, last, size)


def _only_maker(value: ir.Value | None, operator: str) -> ir.Node | None:
    """Returns the node that computes a value, if it has this operator and nothing else takes the value."""
    node = value.producer() if value is not None and _has_one_use(value) else None
    return node if node is not None and node.op_type == operator else None


def _has_one_use(value: ir.Value) -> bool:
    return len(value.uses()) == 1 and not value.is_graph_output()


_RULES: dict[str, Callable[[ir.Node, bool, int], list[_Place] | None]] = {
    "Add": _of_sum,
    "Cast": lambda node, last, size: _inside(node, 0, last, size),
    "LayerNormalization": _of_layer_norm,
    "MatMul": lambda node, last, size: _either(node, 1, last, size),
    "Mul": _of_product,
    "Reshape": _of_joined_heads,
    "Slice": lambda node, last, size: _either(node, 0, last, size),
}
"""Finds those constants, by the operator that computes the value."""


def multiply_constant(graph: ir.Graph, node: ir.Node, index: int, factors: Floats, name: str) -> None:
    """Multiplies a constant for one of its users alone, when it is written.

    Args:
        graph: the graph.
        node: the user.
        index: of the constant among its inputs.
        factors: fp32, of a shape that broadcasts.
        name: of the product.
    """
    value = node.inputs[index]
    assert value is not None
    constant = value.const_value
    assert constant is not None
    tensor = ir.LazyTensor(
        partial(_scaled, constant, factors), dtype=constant.dtype, shape=ir.Shape(constant.shape), name=name
    )
    node.replace_input_with(index, initializer(graph, tensor))


def _scaled(constant: ir.TensorProtocol, factors: Floats) -> ir.Tensor:
    """Returns a constant times factors that broadcast, in the constant's type."""
    values = constant.numpy().astype(np.float32) * factors
    return ir.Tensor(values.astype(constant.dtype.numpy()), dtype=ir.DataType(constant.dtype))
