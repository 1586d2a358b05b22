"""Finds the attentions of the portable graphs and fuses them into single operators."""

import math
from collections.abc import Callable

import onnx_ir as ir
from onnx_ir.passes import common

from .node_helpers import only_user, producer, scalar

DECOMPOSABLE = "TRT_decomposable"
"""TensorRT's attribute of Attention: whether TensorRT may split it if no kernel fits."""
ATTENTION_OPSET = 23
"""The first opset with Attention."""


def is_spatial_attention(name: str) -> bool:
    """Whether a node belongs to an attention of a spatial transformer."""
    return ".attentions." in name and (".attn1/" in name or ".attn2/" in name)


def is_spatial_self_attention(name: str) -> bool:
    """Whether a node belongs to the self-attention of a spatial transformer."""
    return ".attentions." in name and ".attn1/" in name


def is_temporal_attention(name: str) -> bool:
    """Whether a node belongs to an attention of a temporal transformer, which is always self-attention."""
    return ".motion_modules." in name and (".attn1/" in name or ".attn2/" in name)


def is_transformer_attention(name: str) -> bool:
    """Whether a node belongs to an attention of a spatial or temporal transformer."""
    return is_spatial_attention(name) or is_temporal_attention(name)


def softmaxes(model: ir.Model, belongs: Callable[[str], bool]) -> list[ir.Node]:
    """Returns the softmax of every attention for whose node name `belongs` is true."""
    return [node for node in model.graph if node.op_type == "Softmax" and belongs(node.name or "")]


def fuse_attention(model: ir.Model, belongs: Callable[[str], bool]) -> int:
    """Replaces every attention for whose node name `belongs` is true with ONNX's Attention; returns how many.

    TensorRT then builds one kernel, without having to recognise the pattern softmax(QK)V.
    """
    found = softmaxes(model, belongs)
    for softmax in found:
        scores, mixed = producer(softmax.inputs[0]), only_user(softmax)
        query, key = (_heads(value) for value in scores.inputs)
        attention = ir.node(
            "Attention",
            [query, key, mixed.inputs[1]],
            {"scale": attention_scale(scores)},
            name=(softmax.name or "").replace("Softmax", "Attention"),
        )
        model.graph.insert_after(mixed, attention)
        mixed.outputs[0].replace_all_uses_with(attention.outputs[0])
    if found:
        model.graph.opset_imports[""] = ATTENTION_OPSET
        common.RemoveUnusedNodesPass()(model)
    return len(found)


def _heads(value: ir.Value | None) -> ir.Value:
    """Walks back over scale and transpose; returns the heads of a projection, [B, heads, S, d]."""
    while not _splits_heads(node := producer(value)):
        value = node.inputs[0]
    return node.outputs[0]


def _splits_heads(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and tuple(node.attributes["perm"].as_ints()) == (0, 2, 1, 3)


def attention_scale(scores: ir.Node) -> float:
    """Returns the factor of an attention's scores: that of the queries times that of the keys."""
    return _scale(producer(scores.inputs[0])) * _scale(producer(scores.inputs[1]))


def _scale(multiplication: ir.Node) -> float:
    """Returns the factor of Mul(x, Sqrt(constant))."""
    root = producer(multiplication.inputs[1])
    assert (multiplication.op_type, root.op_type) == ("Mul", "Sqrt")
    return math.sqrt(scalar(root.inputs[0]))
