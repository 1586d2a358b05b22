"""Follows the edges of a graph, and creates the nodes that replace others."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape


def producer(value: ir.Value | None) -> ir.Node:
    """Returns the node that computes `value`."""
    node = value.producer() if value is not None else None
    assert node is not None
    return node


def only_user(node: ir.Node) -> ir.Node:
    """Returns the only node that takes the output of `node`."""
    (use,) = node.outputs[0].uses()
    return use.node


def scalar(value: ir.Value | None) -> float:
    """Returns the only element of a constant."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    assert tensor is not None, f"{value} is not a constant"
    return float(tensor.numpy().item())


def cast(value: ir.Value | None, dtype: ir.DataType, name: str) -> ir.Node:
    """Returns a new Cast, whose result has this name."""
    node = ir.node("Cast", [value], {"to": int(dtype)}, name=f"{name}/Cast")
    node.outputs[0].name = name
    return node


def initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """Adds a constant to a graph, under the tensor's name; returns its value."""
    value = ir.Value(
        name=tensor.name, const_value=tensor, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype)
    )
    graph.register_initializer(value)
    return value


def insert_behind(graph: ir.Graph, value: ir.Value, *nodes: ir.Node) -> None:
    """Inserts nodes right after the one that computes a value, or first if none does."""
    maker = value.producer()
    if maker is None:
        graph.insert_before(graph[0], nodes)
    else:
        graph.insert_after(maker, nodes)


def hand_over(graph: ir.Graph, old: ir.Value, new: ir.Value, uses: Iterable[tuple[ir.Node, int]]) -> None:
    """Puts a value that is computed from another in its place, for these uses and as an output of the graph."""
    for node, place in uses:
        node.replace_input_with(place, new)
    for index, output in enumerate(graph.outputs):
        if output is old:
            new.name, new.type, new.shape = old.name, old.type, old.shape
            old.name, old.type, old.shape = f"{old.name}.before", None, None
            graph.outputs[index] = new


class Rewriting:
    """New nodes of a graph, in order. Their names begin with the name of what they replace.

    Args:
        graph: gets the constants at once; the caller inserts `nodes`.
        name: prefix of the names of nodes and constants.
    """

    def __init__(self, graph: ir.Graph, name: str) -> None:
        self.graph = graph
        self.name = name
        self._tape = Tape()

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        """The nodes created so far."""
        return tuple(self._tape.nodes)

    def op(self, operator: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """Adds an operator, ONNX's own without `domain`; returns its result."""
        return self._tape.op(operator, inputs, attributes or None, domain=domain, name=self._next_name())

    def split(self, value: ir.Value, count: int) -> tuple[ir.Value, ...]:
        """Splits into equal parts along the first axis."""
        attributes = {"axis": 0, "num_outputs": count}
        return tuple(self._tape.op_multi_out("Split", [value], attributes, num_outputs=count, name=self._next_name()))

    def join(self, *parts: ir.Value) -> ir.Value:
        """Concatenates along the first axis."""
        return self.op("Concat", *parts, axis=0)

    def picked(self, value: ir.Value | None, *places: int) -> ir.Value:
        """Gathers some places of the first axis."""
        return self.op("Gather", value, self.integers(*places), axis=0)

    def integers(self, *values: int) -> ir.Value:
        """Adds a constant vector of int64."""
        return self.constant(np.array(values, np.int64))

    def constant(self, array: Any) -> ir.Value:
        """Adds a constant."""
        name = f"{self.name}.constant{len(self._tape.initializers)}"
        value = self._tape.initializer(ir.tensor(array, name=name), name)
        self.graph.register_initializer(value)
        return value

    def replace(self, node: ir.Node, result: ir.Value) -> None:
        """Replaces `node` with the new nodes, and its output with `result`."""
        ir.convenience.replace_nodes_and_values(self.graph, node, [node], self.nodes, node.outputs, [result])

    def _next_name(self) -> str:
        return f"{self.name}.{len(self._tape.nodes)}"
