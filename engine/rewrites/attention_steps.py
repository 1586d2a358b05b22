"""Writes fused attention out as two products and a softmax, for libraries without a kernel for it."""

import numpy as np
import onnx_ir as ir

from .node_helpers import Rewriting

_SWAP_LAST_AXES = [0, 1, 3, 2]


def write_out_attention(model: ir.Model, low: ir.DataType) -> int:
    """Replaces every Attention with its steps, in place; returns how many.

    As in a fused kernel, scores and softmax are in fp32, and the probabilities are rounded before the second product.

    Args:
        model: a typed graph.
        low: the type of its attentions.
    """
    found = [node for node in model.graph if node.op_type == "Attention"]
    for node in found:
        query, key, value = node.inputs  # [B, heads, S, d]
        steps = Rewriting(model.graph, f"{node.name}.steps")
        turned = steps.op("Transpose", steps.op("Cast", key, to=ir.DataType.FLOAT), perm=_SWAP_LAST_AXES)
        scores = steps.op("MatMul", steps.op("Cast", query, to=ir.DataType.FLOAT), turned)
        scale = steps.constant(np.float32(node.attributes["scale"].as_float()))
        softmax = steps.op("Softmax", steps.op("Mul", scores, scale), axis=-1)
        steps.replace(node, steps.op("MatMul", steps.op("Cast", softmax, to=low), value))
    return len(found)
