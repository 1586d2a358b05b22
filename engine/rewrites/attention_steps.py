"""Writes fused attention out as two products and a softmax, for libraries without a kernel for it."""

import numpy as np
import onnx_ir as ir

from .node_helpers import Rewriting

_SWAP_LAST_AXES = [0, 1, 3, 2]


def write_out_attention(model: ir.Model, low: ir.DataType, scores: ir.DataType = ir.DataType.FLOAT) -> int:
    """Replaces every Attention with its steps, in place; returns how many.

    The probabilities are rounded before the second product, as in a fused kernel.

    Args:
        model: a typed graph.
        low: the type of its attentions.
        scores: the type of scores and softmax. In fp32 the steps compute what a fused kernel does.
    """
    found = [node for node in model.graph if node.op_type == "Attention"]
    for node in found:
        steps = Rewriting(model.graph, f"{node.name}.steps")
        *factors, value = node.inputs  # [B, heads, S, d]
        query, key = factors if scores == low else (steps.op("Cast", factor, to=scores) for factor in factors)
        scale = steps.constant(np.asarray(node.attributes["scale"].as_float(), scores.numpy()))
        turned = steps.op("Transpose", key, perm=_SWAP_LAST_AXES)
        softmax = steps.op("Softmax", steps.op("MatMul", steps.op("Mul", query, scale), turned), axis=-1)
        steps.replace(node, steps.op("MatMul", softmax if scores == low else steps.op("Cast", softmax, to=low), value))
    return len(found)
