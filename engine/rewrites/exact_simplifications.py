"""Rewrites that compute the same numbers with less work. They help CPUs, whose time goes into arithmetic."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from .node_helpers import producer


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


def _half(graph: ir.Graph, value: ir.Value | None, index: int) -> ir.Value:
    """Returns the first or second half of a weight along its last axis."""

    def half(array: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.ascontiguousarray(np.split(array, 2, axis=-1)[index])

    *leading, last = weight_shape(value)
    return derived_weight(graph, value, f"{index}", (*leading, last // 2), half)


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
