"""Fuses self-attention into ONNX Runtime's MultiHeadAttention.

It computes the scores block by block (Dao et al. 2022, arXiv:2205.14135).
"""

from collections.abc import Callable

import onnx_ir as ir
from onnx_ir.passes import common

from .attention import attention_scale, softmaxes
from .node_helpers import only_user, producer

DOMAIN = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""


def fuse_multi_head_attention(model: ir.Model, belongs: Callable[[str], bool]) -> int:
    """Replaces every self-attention for whose node name `belongs` is true; returns how many."""
    found = softmaxes(model, belongs)
    for softmax in found:
        scores = producer(softmax.inputs[0])
        mixed = only_user(softmax)
        merged = only_user(only_user(mixed))
        (query, heads), (key, _), (value, _) = map(_before_heads, (*scores.inputs, mixed.inputs[1]))
        options = {"num_heads": heads, "scale": attention_scale(scores)}
        attention = ir.node("MultiHeadAttention", [query, key, value], options, domain=DOMAIN, name=softmax.name)
        model.graph.insert_after(merged, attention)
        merged.outputs[0].replace_all_uses_with(attention.outputs[0])
    if found:
        model.graph.opset_imports[DOMAIN] = 1
        common.RemoveUnusedNodesPass()(model)
    return len(found)


def _before_heads(value: ir.Value | None) -> tuple[ir.Value, int]:
    """Walks back from a tensor [B, heads, S, d]; returns its projection [B, S, heads*d] and the number of heads."""
    heads = 0
    while (node := producer(value)).op_type in ("Mul", "Transpose", "Reshape"):
        if node.op_type == "Reshape" and (found := _heads(node)):
            heads = found
        value = node.inputs[0]
    assert value is not None
    assert heads
    return value, heads


def _heads(reshape: ir.Node) -> int:
    """Returns `heads` of a reshape to [B, S, heads, d]; 0 if it is not a constant."""
    shape = reshape.inputs[1].producer() if reshape.inputs[1] is not None else None
    if shape is None or shape.op_type != "Concat" or len(shape.inputs) != 4:
        return 0
    size = shape.inputs[2]
    return int(size.const_value.numpy()[0]) if size is not None and size.const_value is not None else 0
