"""Rewrites typed graphs so that torch runs fewer kernels. Each rewrite replaces several nodes with one."""

import onnx_ir as ir
from onnx_ir.passes import common

DOMAIN = "torch"
_NORMS = ("GroupNormalization", "LayerNormalization")


def fuse(model: ir.Model) -> set[str]:
    """Fuses in place. Returns the weights of norms that are now needed in the low type."""
    narrowed = _narrow_norms(model)
    _fuse_silu(model)
    _fuse_linear(model)
    model.graph.opset_imports[DOMAIN] = 1
    common.RemoveUnusedNodesPass()(model)
    return narrowed


def _narrow_norms(model: ir.Model) -> set[str]:
    """Removes the casts around norms: torch's kernels compute the statistics of low types in fp32 themselves."""
    weights: set[str] = set()
    for norm in [node for node in model.graph if node.op_type in _NORMS]:
        before = norm.inputs[0].producer() if norm.inputs[0] is not None else None
        users = [use.node for use in norm.outputs[0].uses()]
        if before is None or not users or any(node.op_type != "Cast" for node in (before, *users)):
            continue
        if any(user.outputs[0].is_graph_output() for user in users):
            continue
        types = {user.attributes["to"].as_int() for user in users}
        if len(types) != 1 or ir.DataType(types.pop()) == ir.DataType.FLOAT:
            continue
        norm.replace_input_with(0, before.inputs[0])
        for user in users:
            user.outputs[0].replace_all_uses_with(norm.outputs[0])
        weights |= {value.name for value in norm.inputs[1:] if value is not None and value.name}
    return weights


def _fuse_silu(model: ir.Model) -> None:
    """x * sigmoid(x)."""
    for sigmoid in [node for node in model.graph if node.op_type == "Sigmoid"]:
        for use in list(sigmoid.outputs[0].uses()):
            product = use.node
            others = [value for value in product.inputs if value is not sigmoid.outputs[0]]
            if product.op_type == "Mul" and others == [sigmoid.inputs[0]]:
                _replace(model, product, "Silu", [sigmoid.inputs[0]])


def _fuse_linear(model: ir.Model) -> None:
    """A product with a weight, and the addition of a bias."""
    for product in [node for node in model.graph if node.op_type == "MatMul"]:
        uses = list(product.outputs[0].uses())
        if len(uses) != 1 or uses[0].node.op_type != "Add" or not _is_weight(product.inputs[1], 2):
            continue
        addition = uses[0].node
        (bias,) = [value for value in addition.inputs if value is not product.outputs[0]]
        if _is_weight(bias, 1):
            _replace(model, addition, "Linear", [*product.inputs, bias])


def _is_weight(value: ir.Value | None, rank: int) -> bool:
    return value is not None and value.const_value is not None and len(value.const_value.shape) == rank


def _replace(model: ir.Model, node: ir.Node, op_type: str, inputs: list[ir.Value | None]) -> None:
    fused = ir.node(op_type, inputs, domain=DOMAIN, name=node.name)
    model.graph.insert_after(node, fused)
    name, old = node.outputs[0].name, node.outputs[0]
    ir.convenience.replace_all_uses_with(old, fused.outputs[0], replace_graph_outputs=True)
    fused.outputs[0].name, fused.outputs[0].type = name, old.type
    model.graph.remove(node, safe=True)
