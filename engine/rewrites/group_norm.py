"""Finds the group norms of the portable graphs and fuses them into single operators."""

import re
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes import common

from .node_helpers import only_user, producer, scalar

_GROUP_NORMS = (("Reshape", "InstanceNormalization", "Mul", "Add"), ("Reshape", "Mul", "Mul", "Add"))
"""The operators of a group norm from the split into groups on: of images, and over a clip."""
_OVER_FRAMES = re.compile(r"((^|\.)resnets\.\d+\.norm[12]|^conv_norm_out)/Reciprocal")
"""Matches the name of a node that only norms of images have whose statistics are over the frames of a clip."""
_OF_ATTENTION = re.compile(r"(^|\.)attentions\.\d+\.group_norm/")
"""Matches the name of a node of the norm in a VAE's attention, which takes flattened images."""
_AFFINE_OF_IMAGES = [-1, 1, 1]
"""The shape to which a group norm of images reshapes its weight; that of a motion module has one axis of pixels."""


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
        groups = scalar(producer(split.inputs[1]).inputs[-3])  # [B, G, F*C/G, h*w] or [B, F, G, C/G, h*w]
        deviation = producer(producer(normalized.inputs[1]).inputs[0])
        epsilon = scalar(producer(deviation.inputs[0]).inputs[1])
    found = (split.op_type, normalized.op_type, scaled.op_type, shifted.op_type)
    assert found in _GROUP_NORMS, f"{shifted.name} does not end a group norm: {found}"
    return GroupNorm(split, _parameter(scaled), _parameter(shifted), int(groups), epsilon)


def _flattening(instance: ir.Node, source: ir.Value | None) -> ir.Node | None:
    """Returns the Reshape from [N, C, H, W] to [N, C, H*W] before the norm of a VAE's attention."""
    if not _OF_ATTENTION.search(instance.name or ""):
        return None
    node = producer(source)
    while node.op_type == "Transpose":  # twice: there and back
        node = producer(node.inputs[0])
    return node if node.op_type == "Reshape" else None


def _parameter(node: ir.Node) -> ir.Value:
    """Returns the weight or bias [C] that `node` takes after a reshape to [C, 1, 1]."""
    for value in node.inputs:
        reshape = value.producer() if value is not None else None
        source = reshape.inputs[0] if reshape is not None else None
        if source is not None and source.const_value is not None:
            return source
    raise AssertionError(f"{node.name} has no parameter")


def norms_over_frames(graph: ir.Graph) -> list[ir.Node]:
    """Returns the last nodes of the norms of images [B*F, C, H, W] whose statistics are over all frames of a clip."""
    inverses = [node for node in graph if _OVER_FRAMES.match(node.name or "")]
    return [only_user(only_user(only_user(only_user(inverse)))) for inverse in inverses]


def is_of_images(instance: ir.Node) -> bool:
    """Whether the norm around an InstanceNormalization is of images [N, C, H, W]."""
    scaled = only_user(only_user(instance))
    affine = ir.convenience.get_const_tensor(producer(scaled.inputs[1]).inputs[1])
    return affine is not None and affine.numpy().tolist() == _AFFINE_OF_IMAGES


def fuse_group_norm(model: ir.Model) -> int:
    """Replaces Reshape, InstanceNormalization, Reshape, Mul, Add with GroupNormalization; returns how many.

    This saves an engine the two changes of layout that the reshapes require. A norm of flattened images [N, C, H*W], as
    in the attention of a VAE, becomes one of images: TensorRT-RTX has one kernel for it, and three for the other.
    """
    found = [node for node in model.graph if node.op_type == "InstanceNormalization"]
    for norm in found:
        shifted = only_user(only_user(only_user(norm)))
        parts = read_group_norm(shifted)
        source = parts.split.inputs[0]
        flattening = _flattening(norm, source)
        fused = ir.node(
            "GroupNormalization",
            [flattening.inputs[0] if flattening else source, parts.weight, parts.bias],
            {"num_groups": parts.groups, "epsilon": parts.epsilon},
            name=(norm.name or "").replace("Instance", "Group"),
        )
        nodes = [fused]
        if flattening:
            nodes.append(ir.node("Reshape", [fused.outputs[0], flattening.inputs[1]], name=f"{fused.name}.flattened"))
        model.graph.insert_after(shifted, nodes)
        shifted.outputs[0].replace_all_uses_with(nodes[-1].outputs[0])
    if found:
        common.RemoveUnusedNodesPass()(model)
    return len(found)
