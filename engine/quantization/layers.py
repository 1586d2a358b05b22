"""The layers that can be quantized: products with a weight, and convolutions."""

import re
from collections.abc import Container

import onnx_ir as ir

from ..rewrites import exact_simplifications

_LEFT = re.compile(
    r"(^|\.)(conv_in|conv_out|time_emb\w*|controlnet_cond_embedding)(\.|/)|/(Gemm)_|\.attentions\..*attn2\.to_[kv]/"
)
"""Matrix layers that keep their type: first and last convolution, time embedding, keys and values of the text."""
_MIN_CHANNELS = 32


def quantizable(model: ir.Model) -> list[ir.Node]:
    """Returns the matrix layers that can be quantized: products with a weight, and convolutions."""
    return [node for node in model.graph if _has_weight(node) and not _LEFT.search(node.name or "")]


def _has_weight(node: ir.Node) -> bool:
    if node.op_type not in ("MatMul", "Conv") or node.attributes.get_int("group", 1) != 1:
        return False
    weight = node.inputs[1]
    shape = weight.const_value.shape if weight is not None and weight.const_value is not None else None
    return shape is not None and len(shape) >= 2 and min(int(size) for size in shape[:2]) >= _MIN_CHANNELS


def layer_input(node: ir.Node) -> ir.Value:
    """Returns the activation that a layer takes."""
    source = node.inputs[0]
    assert source is not None
    return source


def is_silu(value: ir.Value) -> bool:
    """Whether a value is the SiLU of another, x * sigmoid(x), in any type."""
    node = _before_casts(value)
    if node is None or node.op_type != "Mul":
        return False
    for source, factor in (node.inputs, node.inputs[::-1]):
        gate = _before_casts(factor)
        if gate is not None and gate.op_type == "Sigmoid" and gate.inputs[0] is source:
            return True
    return False


def _before_casts(value: ir.Value | None) -> ir.Node | None:
    """Returns the node that computes a value, before it is cast."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type == "Cast":
        source = node.inputs[0]
        node = source.producer() if source is not None else None
    return node


def layer_weight(node: ir.Node) -> ir.Value:
    """Returns the weight of a layer: [in, out] of a product, [out, in, ...] of a convolution."""
    weight = node.inputs[1]
    assert weight is not None
    return weight


def weight_shape(node: ir.Node) -> tuple[int, ...]:
    """Returns the shape of a layer's weight."""
    return exact_simplifications.weight_shape(layer_weight(node))


def input_axis(node: ir.Node) -> int:
    """Returns the axis of a layer's weight with the input channels."""
    return 0 if node.op_type == "MatMul" else 1


def output_axis(node: ir.Node) -> int:
    """Returns the axis of a layer's weight with the output channels."""
    return 1 if node.op_type == "MatMul" else 0


def belongs_to(node: ir.Node, layers: Container[str]) -> bool:
    """Whether a node is one of these layers or adds its bias: product and sum of a linear layer are one kernel."""
    if node.op_type == "Add" and _has_constant(node):
        makers = (value.producer() for value in node.inputs if value is not None)
        return any(maker is not None and maker.name in layers for maker in makers)
    return node.name in layers


def _has_constant(node: ir.Node) -> bool:
    return any(value is not None and value.const_value is not None for value in node.inputs)
