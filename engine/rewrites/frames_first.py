"""Keeps the rows of motion modules in the order of images: frames first, then pixels.

As exported, a motion module turns its frames to rows [H*W, F, C]. TensorRT's attention over time wants those of one
frame side by side, so that pixels and heads are one axis. It then transposes before each attention, and cannot make one
kernel of the layer norm before that: two halves exchange an activation in fp32. Rows [F, H*W, C] are not transposed.
"""

import re

import onnx_ir as ir

from .exact_simplifications import remove_unused, weight_shape
from .node_helpers import Rewriting, only_user, producer

_ENTRANCE = re.compile(r"(?P<module>(^|.*\.)motion_modules\.\d+)\.proj_in/MatMul")
"""Matches the name of a motion module's first matrix product."""
_SPLIT, _MERGE = [1, 2, 0, 3], [2, 0, 1, 3]
"""Axes of [F, H*W, heads, d] in an attention over time [H*W, heads, F, d], and back."""


def keep_frames_first(model: ir.Model) -> int:
    """Changes every motion module whose group norm has statistics of each frame, in place; returns how many.

    Args:
        model: a graph with fused norms and attentions, for one prompt.
    """
    entrances = [(node, match["module"]) for node in model.graph if (match := _ENTRANCE.match(node.name or ""))]
    found = [(node, module) for node, module in entrances if _frames(node).op_type == "GroupNormalization"]
    for entrance, module in found:
        nodes = [node for node in model.graph if (node.name or "").startswith(f"{module}.")]
        _enter(model.graph, entrance)
        _turn_positions(model.graph, [node for node in nodes if ".pos_embed/Add" in (node.name or "")])
        for node in nodes:
            if node.op_type == "Attention":
                _attend(model.graph, node)
        (last,) = (node for node in nodes if (node.name or "").startswith(f"{module}.proj_out/Add"))
        _leave(model.graph, last)
    remove_unused(model, [node for node, _ in found])
    return len(found)


def _frames(entrance: ir.Node) -> ir.Node:
    """Returns the node whose result [F, C, H, W] becomes the rows that a module begins with."""
    node = producer(entrance.inputs[0])
    while node.op_type in ("Reshape", "Transpose"):
        node = producer(node.inputs[0])
    return node


def _enter(graph: ir.Graph, entrance: ir.Node) -> None:
    """Gives a module the rows [F, H*W, C] of its frames [F, C, H, W]."""
    channels, _ = weight_shape(entrance.inputs[1])
    turn = Rewriting(graph, f"{entrance.name}.frames_first")
    images = turn.op("Transpose", _frames(entrance).outputs[0], perm=[0, 2, 3, 1])
    rows = turn.op("Reshape", images, turn.integers(0, -1, channels))
    graph.insert_before(entrance, turn.nodes)
    entrance.replace_input_with(0, rows)


def _turn_positions(graph: ir.Graph, sums: list[ir.Node]) -> None:
    """Adds the embeddings of positions [1, F, C] as [F, 1, C]."""
    for node in sums:
        turn = Rewriting(graph, f"{node.name}.frames_first")
        turned = turn.op("Transpose", node.inputs[1], perm=[1, 0, 2])
        graph.insert_before(node, turn.nodes)
        node.replace_input_with(1, turned)


def _attend(graph: ir.Graph, attention: ir.Node) -> None:
    """Splits rows [F, H*W, C] into the heads of an attention over time, and merges those of its result."""
    for heads in attention.inputs:
        split = producer(heads)
        _reshape(graph, producer(split.inputs[0]), keeps_heads=True)
        split.attributes["perm"] = ir.AttrInt64s("perm", _SPLIT)
    merge = only_user(attention)
    merge.attributes["perm"] = ir.AttrInt64s("perm", _MERGE)
    _reshape(graph, only_user(merge), keeps_heads=False)


def _reshape(graph: ir.Graph, reshape: ir.Node, keeps_heads: bool) -> None:
    """Lets a Reshape to [H*W, F, heads, d] or [H*W, F, C] keep the first two sides of its input."""
    turn = Rewriting(graph, f"{reshape.name}.frames_first")
    kept = turn.integers(0, 0)
    shape = turn.join(kept, turn.picked(reshape.inputs[1], 2, 3) if keeps_heads else turn.integers(-1))
    graph.insert_before(reshape, turn.nodes)
    reshape.replace_input_with(1, shape)
    reshape.attributes.pop("allowzero", None)  # with it a 0 is the size itself


def _leave(graph: ir.Graph, last: ir.Node) -> None:
    """Makes frames [F, C, H, W] of the rows [F, H*W, C] that a module ends with."""
    frames = only_user(only_user(only_user(last)))
    turn = Rewriting(graph, f"{frames.name}.frames_first")
    images = turn.op("Reshape", last.outputs[0], turn.picked(frames.inputs[1], 0, 2, 3, 1))
    turned = turn.op("Transpose", images, perm=[0, 3, 1, 2])
    graph.insert_before(frames, turn.nodes)
    frames.outputs[0].replace_all_uses_with(turned)
