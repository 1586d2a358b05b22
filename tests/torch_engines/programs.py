"""Compiles a typed graph with static shapes into a list of torch calls.

Everything that follows from shapes and constants is computed once. A pass over tensors without data (torch's meta
device) gives the shapes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from .operators import ONNX_TYPES, OPERATORS, Function, Operator

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Call:
    """One torch call: its inputs and outputs by name, and the values that nothing needs after it."""

    function: Function
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    last_uses: tuple[str, ...] = ()


@dataclass(slots=True)
class Program:
    """The calls of a graph.

    Attributes:
        calls: in order.
        constants: tensors by name, on the host.
        known_outputs: outputs that follow from shapes and constants alone.
        weights: names of the initialisers that the calls take.
        outputs: names of the graph's outputs.
    """

    outputs: tuple[str, ...]
    calls: list[Call] = field(default_factory=list)
    constants: dict[str, Tensor] = field(default_factory=dict)
    known_outputs: dict[str, Tensor] = field(default_factory=dict)
    weights: list[str] = field(default_factory=list)

    def run(self, tensors: Mapping[str, Tensor], results: Mapping[str, Tensor]) -> None:
        """Computes the outputs into `results`; `tensors` are inputs, weights and constants."""
        values = dict(tensors)
        for call in self.calls:
            made = call.function(*[values[name] for name in call.inputs])
            if len(call.outputs) == 1:
                values[call.outputs[0]] = made
            else:
                values.update(zip(call.outputs, made, strict=True))
            for name in call.last_uses:
                del values[name]
        for name, result in results.items():
            result.copy_(values[name])


def compile_graph(model: ir.Model, shapes: Shapes, weight_types: Mapping[str, torch.dtype]) -> Program:
    """The program of a graph.

    Args:
        model: the graph.
        shapes: of its inputs, by name.
        weight_types: the types of weights that the caller provides; other initialisers become constants.
    """
    compiler = _Compiler(model, weight_types)
    for value in model.graph.inputs:
        compiler.values[value.name] = torch.empty(shapes[value.name], dtype=dtype_of(value), device="meta")
    for node in model.graph:
        compiler.add(node)
    program = compiler.program
    program.known_outputs = {name: compiler.known[name] for name in program.outputs if name in compiler.known}
    program.calls = _with_last_uses(program.calls, kept={*program.outputs, *shapes, *program.constants, *weight_types})
    return program


class _Compiler:
    """One pass over a graph. `known` are values on the host; `values` stand for those on the device."""

    def __init__(self, model: ir.Model, weight_types: Mapping[str, torch.dtype]) -> None:
        self.program = Program(tuple(str(value.name) for value in model.graph.outputs))
        self.known: dict[str, Tensor] = {}
        self.values: dict[str, Tensor] = {}
        for name, value in model.graph.initializers.items():
            assert value.const_value is not None
            if name in weight_types:
                shape = [int(size) for size in value.const_value.shape]
                self.values[name] = torch.empty(shape, dtype=weight_types[name], device="meta")
                self.program.weights.append(name)
            else:
                self.known[name] = to_torch(value.const_value.numpy(), value.const_value.dtype)

    def add(self, node: ir.Node) -> None:
        operator = OPERATORS[node.op_type]
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        names = [None if value is None else value.name for value in node.inputs]
        fixed = [names[place] if place < len(names) else None for place in operator.known]
        while fixed and fixed[-1] is None:
            fixed.pop()
        function = operator.make(attributes, *(None if name is None else self.known[name] for name in fixed))
        inputs = [name for place, name in enumerate(names) if place not in operator.known and name is not None]
        outputs = tuple(str(value.name) for value in node.outputs)
        if all(name in self.known for name in inputs) or node.op_type == "Shape":
            found = function(*(self.known[name] if name in self.known else self.values[name] for name in inputs))
            self.known |= dict(zip(outputs, found if len(outputs) > 1 else (found,), strict=True))
            return
        arguments = [self.argument(name, operator) for name in inputs]
        found = function(*arguments)
        self.values |= dict(zip(outputs, found if len(outputs) > 1 else (found,), strict=True))
        self.program.calls.append(Call(function, tuple(inputs), outputs))

    def argument(self, name: str, operator: Operator) -> Tensor:
        """What stands for an input. A known one becomes a constant of the program."""
        if name in self.values:
            return self.values[name]
        constant = self.known[name]
        if operator.elementwise and constant.numel() == 1 and constant.ndim <= 1:
            self.program.constants[name] = constant.reshape(())  # a number on the host fits tensors of any device
            return self.program.constants[name]
        self.program.constants[name] = constant
        return constant.to("meta")


def _with_last_uses(calls: list[Call], kept: set[str]) -> list[Call]:
    seen = set(kept)
    found = []
    for call in reversed(calls):
        last = {*call.inputs, *call.outputs} - seen
        seen |= last
        found.append(Call(call.function, call.inputs, call.outputs, tuple(sorted(last))))
    return found[::-1]


def dtype_of(value: ir.Value) -> torch.dtype:
    """The type of an input or output."""
    assert value.dtype is not None
    return ONNX_TYPES[int(value.dtype)]


def to_torch(array: Any, dtype: ir.DataType) -> Tensor:
    """A tensor with the values of a numpy array; bfloat16 arrives as a type that torch does not know."""
    if dtype == ir.DataType.BFLOAT16:
        return torch.from_numpy(array.view("int16").copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())
