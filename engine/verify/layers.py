"""Finds the first tensor of a graph at which a backend's error jumps.

First, tensors spread over the whole graph become outputs; then those that the first wrong one was computed from, until
all of these are right.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from ..comparison import BOUNDS
from ..rewrites.precision import MOVES
from ..rewrites.typed_graph import typed_graph
from .marked_graphs import ONNX, Suspect, tensor_errors

MARKED = 24
"""Tensors that become outputs at a time; bounds the memory."""
JUMP = 5.0
"""An error is a jump if it is this many times the largest error before it."""
_NOT_FLOAT = {"And", "Cast", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "Or", "Shape", "Size"}
"""Operators whose result is not of the type of their inputs."""


@dataclass(frozen=True, slots=True)
class Jump:
    """A tensor at which the error jumps.

    Attributes:
        tensor: its name in the portable graph.
        node: the name of the node that computes it; it begins with the module's path in the checkpoint.
        operator: the node's operator.
        takes: the weights and inputs of the graph that the node takes.
        error: the tensor's largest difference relative to its largest value.
        before: the largest error among the tensors that were computed before it and looked at.
    """

    tensor: str
    node: str
    operator: str
    takes: tuple[str, ...]
    error: float
    before: float


def first_jump(suspect: Suspect) -> Jump | None:
    """The first tensor whose error jumps, or, if the error only grows, the first one seen out of bounds.

    None if all tensors are within bounds once they are outputs: then a fusion is at fault, which the outputs prevent.

    Raises:
        BackendError: the backend cannot run the graph.
    """
    search = _Search(suspect)
    names = list(search.nodes)
    search.look_at([*(names[index * len(names) // MARKED] for index in range(1, MARKED)), *names[-1:]])
    found = search.first_bad()
    while found is not None and (marks := search.sources(found)):
        search.look_at(marks)
        found = search.first_bad()
    found = found or next((name for name in search.measured() if not search.seen[name] <= search.bound), None)
    if found is None:
        return None
    node = search.nodes[found]
    weights = tuple(search.weights(node))
    return Jump(found, str(node.name), node.op_type, weights, search.seen[found], search.before(found))


class _Search:
    """The errors seen so far.

    Attributes:
        nodes: the nodes whose results both graphs have, by the name of the result, in the order of computation.
        seen: the error of each tensor that was an output.
        bound: largest allowed error of an output.
    """

    def __init__(self, suspect: Suspect) -> None:
        self.nodes = _common_nodes(suspect)
        self.seen: dict[str, float] = {}
        self.bound = BOUNDS[suspect.precision].largest
        self._suspect = suspect

    def look_at(self, names: Iterable[str]) -> None:
        """Measures tensors. Those that the backend holds in another shape are dropped."""
        names = [name for name in dict.fromkeys(names) if name not in self.seen]
        if names:
            found = tensor_errors(self._suspect, names)
            self.seen |= found
            self.nodes = {name: node for name, node in self.nodes.items() if name not in names or name in found}

    def measured(self) -> list[str]:
        """The tensors seen so far, in the order of computation."""
        return [name for name in self.nodes if name in self.seen]

    def before(self, name: str) -> float:
        """The largest error among the tensors computed before one."""
        order = self.measured()
        return max((self.seen[each] for each in order[: order.index(name)]), default=0.0)

    def first_bad(self) -> str | None:
        """The first tensor whose error is far above all before it."""
        largest = self.bound / 10
        for name in self.measured():
            if not self.seen[name] <= JUMP * largest:
                return name
            largest = max(largest, self.seen[name])
        return None

    def sources(self, name: str) -> list[str]:
        """The tensors to look at next: what one was computed from, and what that was computed from.

        Empty if everything that it was directly computed from was seen.
        """
        found: list[str] = []
        level = [name]
        while level and len(found) < MARKED:
            level = [each for source in level for each in self._parents(self.nodes[source])]
            fresh = [each for each in dict.fromkeys(level) if each not in self.seen and each not in found]
            if not found and not fresh:
                break
            found += fresh
        return found[:MARKED]

    def weights(self, node: ir.Node) -> list[str]:
        """The names of the weights and inputs of the graph that a node takes, directly or moved."""
        return [
            str(value.name)
            for value in self._leaves(node)
            if value.producer() is None and (value.const_value is None or "." in str(value.name))
        ]

    def _parents(self, node: ir.Node) -> list[str]:
        return [str(value.name) for value in self._leaves(node) if value.name in self.nodes]

    def _leaves(self, node: ir.Node) -> list[ir.Value]:
        """The values that a node was computed from: results in `nodes`, and inputs and weights of the graph."""
        found: dict[ir.Value, None] = {}
        visited, pending = set[ir.Value](), [value for value in node.inputs if value is not None]
        while pending:
            value = pending.pop()
            producer = value.producer()
            if value.name in self.nodes or producer is None:
                found[value] = None
            elif value not in visited and producer.op_type != "Shape":
                visited.add(value)
                pending += [source for source in producer.inputs if source is not None]
        return list(found)


def _common_nodes(suspect: Suspect) -> dict[str, ir.Node]:
    """The nodes of the portable graph that compute, by the name of their float result, if the backend has it too."""
    portable = suspect.portable()
    path = suspect.engine_path()
    if path is None:
        theirs = portable
    elif path.suffix == ONNX:
        theirs = ir.load(path)
    else:
        theirs = typed_graph(suspect.bundle, suspect.graph, suspect.precision)
    known = {output.name for node in theirs.graph for output in node.outputs}
    floats = {value for value in (*portable.graph.inputs, *portable.graph.initializers.values()) if _is_float(value)}
    found = {}
    for node in portable.graph:
        if _gives_float(node, floats):
            floats.update(node.outputs)
            if node.op_type not in MOVES and node.outputs[0].name in known:
                found[str(node.outputs[0].name)] = node
    return found


def _gives_float(node: ir.Node, floats: set[ir.Value]) -> bool:
    if node.op_type == "Cast":
        return bool(ir.DataType(node.attributes["to"].as_int()) == ir.DataType.FLOAT)
    return node.op_type not in _NOT_FLOAT and not floats.isdisjoint(node.inputs)


def _is_float(value: ir.Value) -> bool:
    return bool((value.const_value.dtype if value.const_value is not None else value.dtype) == ir.DataType.FLOAT)
