"""Rewrites that compute the same numbers with less work. They help CPUs, whose time goes into arithmetic."""

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from .node_helpers import only_user, producer

_TAPS = ({0: (0,), 1: (1, 2)}, {0: (0, 1), 1: (2,)})
"""The taps of a 3-tap kernel that read each of two original pixels, at even and odd places of the doubled image."""
_DOUBLING = {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}
_CONVOLUTION = {"kernel_shape": (3, 3), "pads": (1, 1, 1, 1), "strides": (1, 1), "dilations": (1, 1), "group": 1}
"""Attributes, as exported, of a convolution that can be folded."""


def split_gated_units(model: ir.Model) -> int:
    """Gives each half of a GEGLU (Shazeer 2020, arXiv:2002.05202) its own projection; returns how many.

    This removes the split of the wide result, and a backend can fuse GELU into its projection.
    """
    found = [node for node in model.graph if node.op_type == "Gelu" and producer(node.inputs[0]).op_type == "Split"]
    for gelu in found:
        split = producer(gelu.inputs[0])
        shifted = producer(split.inputs[0])
        projected = producer(shifted.inputs[0])
        assert (shifted.op_type, projected.op_type) == ("Add", "MatMul")
        weight, bias = projected.inputs[1], shifted.inputs[1]
        for index, half in enumerate(split.outputs):
            names = (projected.name, shifted.name)
            parts = (_half(model.graph, weight, index), _half(model.graph, bias, index))
            product = ir.node("MatMul", [projected.inputs[0], parts[0]], name=f"{names[0]}.{index}")
            sum_ = ir.node("Add", [product.outputs[0], parts[1]], name=f"{names[1]}.{index}")
            model.graph.insert_after(split, [product, sum_])
            half.replace_all_uses_with(sum_.outputs[0])
    remove_unused(model, found)
    return len(found)


def fold_upsampling(model: ir.Model) -> int:
    """Replaces a doubling and its 3x3 convolution with four 2x2 convolutions at the small size; returns how many.

    It adds up taps that read copies of one pixel ahead of time: 4 products for each output instead of 9
    (Shi et al. 2016, arXiv:1609.07009).
    """
    found = [node for node in model.graph if node.op_type == "Resize" and is_doubled_for_convolution(node)]
    for resize in found:
        convolution = only_user(resize)
        name, biases = convolution.name or "", convolution.inputs[2:]
        phases = [
            ir.node(
                "Conv",
                [resize.inputs[0], _phase(model.graph, convolution.inputs[1], row, column), *biases],
                {"pads": [1 - row, 1 - column, row, column], "kernel_shape": [2, 2]},
                name=f"{name}.{row}{column}",
            )
            for row in (0, 1)
            for column in (0, 1)
        ]
        joined = ir.node("Concat", [phase.outputs[0] for phase in phases], {"axis": 1}, name=f"{name}.phases")
        spread = ir.node("DepthToSpace", [joined.outputs[0]], {"blocksize": 2, "mode": "DCR"}, name=f"{name}.spread")
        model.graph.insert_after(convolution, [*phases, joined, spread])
        convolution.outputs[0].replace_all_uses_with(spread.outputs[0])
    remove_unused(model, found)
    return len(found)


def is_doubled_for_convolution(resize: ir.Node) -> bool:
    """Whether a nearest-neighbour doubling feeds one 3x3 convolution and nothing else."""
    scales = resize.inputs[2] if len(resize.inputs) > 2 else None
    factors = ir.convenience.get_const_tensor(scales) if scales is not None else None
    uses = list(resize.outputs[0].uses())
    if factors is None or factors.numpy().tolist() != [1, 1, 2, 2] or len(uses) != 1:
        return False
    return is_plain_convolution(uses[0].node) and _has(resize, _DOUBLING)


def is_plain_convolution(node: ir.Node) -> bool:
    """Whether a node is a 3x3 convolution whose result is as large as its input."""
    return node.op_type == "Conv" and _has(node, _CONVOLUTION)


def _has(node: ir.Node, attributes: Mapping[str, object]) -> bool:
    found = {name: node.attributes[name].value for name in attributes if name in node.attributes}
    return found == attributes


def _half(graph: ir.Graph, value: ir.Value | None, index: int) -> ir.Value:
    """Returns the first or second half of a weight along its last axis."""

    def half(array: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.ascontiguousarray(np.split(array, 2, axis=-1)[index])

    *leading, last = weight_shape(value)
    return derived_weight(graph, value, f"{index}", (*leading, last // 2), half)


def _phase(graph: ir.Graph, value: ir.Value | None, row: int, column: int) -> ir.Value:
    """Returns the 2x2 kernel of the output pixels at `row` and `column` of each 2x2 block."""

    def phase(array: NDArray[np.float32]) -> NDArray[np.float32]:
        rows = np.stack([array[:, :, list(_TAPS[row][tap])].sum(2) for tap in (0, 1)], axis=2)
        return np.stack([rows[..., list(_TAPS[column][tap])].sum(3) for tap in (0, 1)], axis=3)

    outputs, inputs, *_ = weight_shape(value)
    return derived_weight(graph, value, f"{row}{column}", (outputs, inputs, 2, 2), phase)


def weight_shape(value: ir.Value | None) -> tuple[int, ...]:
    """Returns the shape of a weight."""
    assert value is not None
    assert value.const_value is not None
    return tuple(int(size) for size in value.const_value.shape)


def derived_weight(
    graph: ir.Graph,
    value: ir.Value | None,
    suffix: str,
    shape: tuple[int, ...],
    function: Callable[[NDArray[np.float32]], NDArray[np.float32]],
) -> ir.Value:
    """Adds a weight that is computed from another one when it is written."""
    assert value is not None
    source = value.const_value
    assert source is not None
    name = f"{value.name}.{suffix}"
    tensor = ir.LazyTensor(
        lambda: ir.Tensor(function(source.numpy())), dtype=source.dtype, shape=ir.Shape(shape), name=name
    )
    derived = ir.Value(name=name, const_value=tensor, shape=ir.Shape(shape), type=ir.TensorType(source.dtype))
    graph.initializers[name] = derived
    return derived


def remove_unused(model: ir.Model, found: list[ir.Node]) -> None:
    """Removes unused nodes, if something was `found`."""
    if found:
        common.RemoveUnusedNodesPass()(model)
