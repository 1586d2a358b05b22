"""Fuses patterns of the portable graphs into single operators: attention and group norm."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes import common

DECOMPOSABLE = "TRT_decomposable"
"""TensorRT's attribute of Attention: whether TensorRT may split it if no kernel fits."""
ATTENTION_OPSET = 23
"""The first opset with Attention."""
_GROUP_NORMS = (("Reshape", "InstanceNormalization", "Mul", "Add"), ("Reshape", "Mul", "Mul", "Add"))
"""The operators of a group norm from the split into groups on: of images, and over a clip."""


def producer(value: ir.Value | None) -> ir.Node:
    """Returns the node that computes `value`."""
    node = value.producer() if value is not None else None
    assert node is not None
    return node


def only_user(node: ir.Node) -> ir.Node:
    """Returns the only node that takes the output of `node`."""
    (use,) = node.outputs[0].uses()
    return use.node


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


def fuse_for_tensorrt(model: ir.Model, temporal: bool = True) -> None:
    """Fuses every pattern that TensorRT has an operator for; `temporal` includes attention over time.

    Every Attention may be split: otherwise TensorRT refuses a graph with an attention that no kernel fits.
    """
    fuse_attention(model, is_transformer_attention if temporal else is_spatial_attention)
    for node in model.graph:
        if node.op_type == "Attention":
            node.attributes[DECOMPOSABLE] = ir.AttrInt64(DECOMPOSABLE, 1)
    fuse_group_norm(model)


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
    return math.sqrt(_constant(root.inputs[0]))


def _constant(value: ir.Value | None) -> float:
    """Returns the only element of a constant."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    assert tensor is not None, f"{value} is not a constant"
    return float(tensor.numpy().item())


@dataclass(frozen=True, slots=True)
class GroupNorm:
    """A group norm of a portable graph.

    Attributes:
        split: the Reshape that gives each group an axis.
        weight: [C].
        bias: [C].
        groups: number of groups.
        epsilon: added to the variance.
    """

    split: ir.Node
    weight: ir.Value
    bias: ir.Value
    groups: int
    epsilon: float


def read_group_norm(shifted: ir.Node) -> GroupNorm:
    """Reads the norm that ends in `shifted`: InstanceNormalization; over a clip (x - mean) * (1 / sqrt(variance))."""
    scaled = producer(shifted.inputs[0])
    normalized = producer(producer(scaled.inputs[0]).inputs[0])
    if normalized.op_type == "InstanceNormalization":
        split, instances = producer(normalized.inputs[0]), normalized.inputs[1]
        assert instances is not None
        assert instances.const_value is not None
        (groups,) = instances.const_value.shape
        epsilon = normalized.attributes["epsilon"].as_float()
    else:
        split = producer(producer(normalized.inputs[0]).inputs[0])
        groups = _constant(producer(split.inputs[1]).inputs[1])
        deviation = producer(producer(normalized.inputs[1]).inputs[0])
        epsilon = _constant(producer(deviation.inputs[0]).inputs[1])
    found = (split.op_type, normalized.op_type, scaled.op_type, shifted.op_type)
    assert found in _GROUP_NORMS, f"{shifted.name} does not end a group norm: {found}"
    return GroupNorm(split, _parameter(scaled), _parameter(shifted), int(groups), epsilon)


def _parameter(node: ir.Node) -> ir.Value:
    """Returns the weight or bias [C] that `node` takes after a reshape to [C, 1, 1]."""
    for value in node.inputs:
        reshape = value.producer() if value is not None else None
        source = reshape.inputs[0] if reshape is not None else None
        if source is not None and source.const_value is not None:
            return source
    raise AssertionError(f"{node.name} has no parameter")


def fuse_group_norm(model: ir.Model) -> int:
    """Replaces Reshape, InstanceNormalization, Reshape, Mul, Add with GroupNormalization; returns how many.

    This saves an engine the two changes of layout that the reshapes require.
    """
    found = [node for node in model.graph if node.op_type == "InstanceNormalization"]
    for norm in found:
        shifted = only_user(only_user(only_user(norm)))
        parts = read_group_norm(shifted)
        fused = ir.node(
            "GroupNormalization",
            [parts.split.inputs[0], parts.weight, parts.bias],
            {"num_groups": parts.groups, "epsilon": parts.epsilon},
            name=(norm.name or "").replace("Instance", "Group"),
        )
        model.graph.insert_after(shifted, fused)
        shifted.outputs[0].replace_all_uses_with(fused.outputs[0])
    if found:
        common.RemoveUnusedNodesPass()(model)
    return len(found)
