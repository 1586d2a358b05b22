"""Fuses group norms, and the SiLU after them, into ONNX Runtime's GroupNorm, which only its CUDA provider computes.

It takes channels innermost, as ONNX Runtime's convolutions do with `prefer_nhwc`: the transposes around a norm then
cancel those around the convolutions. It takes and gives fp16, computes in fp32, and keeps weight and bias in fp32.
"""

import onnx_ir as ir
from onnx_ir.passes import common

from .exact_simplifications import weight_shape
from .group_norm import GroupNorm, is_of_images, read_group_norm
from .multi_head_attention import DOMAIN
from .node_helpers import Rewriting, only_user, producer

OPERATOR = "GroupNorm"
_LARGEST_GROUP = 512
"""Channels of a group. The kernel has blocks of at most as many, and each of its threads computes two channels."""
_INNERMOST, _BEFORE_PIXELS = [0, 2, 3, 1], [0, 3, 1, 2]
"""Permutations that move the channels of images."""


def fuse_nhwc_group_norms(model: ir.Model) -> int:
    """Replaces every group norm of images that the kernel can compute; returns how many.

    The norm of a motion module, over the pixels of each frame, is one of these. One over a clip is left as it is.
    """
    count = 0
    for instance in [node for node in model.graph if node.op_type == "InstanceNormalization"]:
        shifted = only_user(only_user(only_user(instance)))
        norm = read_group_norm(shifted)
        (channels,) = weight_shape(norm.weight)
        if not has_kernel(channels, norm.groups):
            continue
        rewriting = Rewriting(model.graph, (instance.name or "").replace("InstanceNormalization", OPERATOR))
        if turned := _turned(shifted):
            rewriting.replace(turned, _normalized_clip(rewriting, norm, producer(turned.inputs[0]).inputs[1]))
        elif is_of_images(instance):
            silu = _silu(shifted.outputs[0])
            normalized = _normalized(rewriting, norm, norm.split.inputs[0], silu is not None)
            rewriting.replace(silu or shifted, rewriting.op("Transpose", normalized, perm=_BEFORE_PIXELS))
        else:
            rewriting.replace(shifted, _normalized_rows(rewriting, norm))
        count += 1
    if count:
        model.graph.opset_imports[DOMAIN] = 1
        common.RemoveUnusedNodesPass()(model)
    return count


def has_kernel(channels: int, groups: int) -> bool:
    """Whether the kernel can compute a norm with these numbers of channels and groups."""
    return channels // groups % 2 == 0 and channels // groups <= _LARGEST_GROUP


def _normalized(rewriting: Rewriting, norm: GroupNorm, source: ir.Value | None, silu: bool) -> ir.Value:
    """Returns [N, H, W, C] for `source` [N, C, H, W]."""
    images = rewriting.op("Transpose", source, perm=_INNERMOST)
    options = {"groups": norm.groups, "epsilon": norm.epsilon, "activation": int(silu), "channels_last": 1}
    return rewriting.op(OPERATOR, images, norm.weight, norm.bias, domain=DOMAIN, **options)


def _silu(value: ir.Value) -> ir.Node | None:
    """Returns the product that ends x * sigmoid(x) of a value, if nothing else takes the value."""
    users = {use.node.op_type: use.node for use in value.uses()}
    if users.keys() != {"Sigmoid", "Mul"} or len(value.uses()) != 2:
        return None
    product = users["Mul"]
    return product if users["Sigmoid"].outputs[0] in product.inputs else None


def _turned(shifted: ir.Node) -> ir.Node | None:
    """Returns the Transpose after a motion module's norm, in which frames and pixels change places."""
    (use, *_) = shifted.outputs[0].uses()
    after = [use.node for use in use.node.outputs[0].uses()] if use.node.op_type == "Reshape" else []
    return after[0] if [node.op_type for node in after] == ["Transpose"] else None


def _normalized_clip(rewriting: Rewriting, norm: GroupNorm, layout: ir.Value | None) -> ir.Value:
    """Returns [B, H*W, F, C] of a motion module, whose frames are normalized as images; `layout` is [-1, F, C, H*W]."""
    normalized = _normalized(rewriting, norm, norm.split.inputs[0], silu=False)
    rows = rewriting.op("Reshape", normalized, rewriting.picked(layout, 0, 1, 3, 2))
    return rewriting.op("Transpose", rows, perm=[0, 2, 1, 3])


def _normalized_rows(rewriting: Rewriting, norm: GroupNorm) -> ir.Value:
    """Returns [N, C, L] of an attention within the VAE; the kernel takes it as images of one line."""
    images = rewriting.op("Unsqueeze", norm.split.inputs[0], rewriting.integers(2))
    normalized = rewriting.op("Transpose", _normalized(rewriting, norm, images, silu=False), perm=_BEFORE_PIXELS)
    return rewriting.op("Squeeze", normalized, rewriting.integers(2))


def define_group_norms(model: ir.Model) -> int:
    """Replaces every GroupNorm with operators of ONNX that compute the same, on any provider; returns how many."""
    found = [node for node in model.graph if node.op_type == OPERATOR and node.domain == DOMAIN]
    for node in found:
        source, weight, bias = node.inputs
        options = {"num_groups": node.attributes["groups"].as_int(), "epsilon": node.attributes["epsilon"].as_float()}
        rewriting = Rewriting(model.graph, f"{node.name}.defined")
        images = rewriting.op("Cast", source, to=ir.DataType.FLOAT)
        images = rewriting.op("Transpose", images, perm=_BEFORE_PIXELS)
        result = rewriting.op("GroupNormalization", images, weight, bias, **options)
        if node.attributes["activation"].as_int():
            result = rewriting.op("Mul", result, rewriting.op("Sigmoid", result))
        result = rewriting.op("Transpose", result, perm=_INNERMOST)
        rewriting.replace(node, rewriting.op("CastLike", result, source))
    return len(found)
