"""torch's ONNX exporter, without decompositions that ONNX does not need.

The exporter replaces torch's composite operators by simpler ones before it translates them. For this it traces the
program twice more, which takes half of the export's time. ONNX has its own counterpart of nearly every operator here.
Then it runs the program again to make casts explicit, of which few are needed.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset21 as op
from torch import nn

OPSET = 21


def to_onnx(module: nn.Module, inputs: tuple[Any, ...], **options: Any) -> ir.Model:
    """Traces `module` with `inputs`; `options` are those of `torch.onnx.export`.

    Raises:
        torch.onnx.OnnxExporterError: torch cannot trace the module, or ONNX has no counterpart of an operator.
    """

    def export() -> Any:
        return torch.onnx.export(
            module,
            inputs,
            dynamo=True,
            opset_version=OPSET,
            optimize=False,
            verbose=False,
            custom_translation_table={torch.ops.aten.to.dtype: _cast},
            **options,
        )

    with _quiet():
        try:
            with _few_decompositions():
                program = export()
        except torch.onnx.OnnxExporterError:  # a composite operator that has no counterpart
            program = export()
    assert program is not None
    model: ir.Model = program.model
    return model


def _cast(values: Any, dtype: int, non_blocking: bool = False, copy: bool = False, memory_format: int = 0) -> Any:
    return op.Cast(values, to=dtype)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps back what torch says of its export, such as that torchvision is missing. Its errors are raised."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


@contextmanager
def _few_decompositions() -> Iterator[None]:
    """Leaves a program as it is if none of its operators is in the table of those without a counterpart in ONNX.

    The exporter then runs it once more to insert casts. Only nodes that get casts are computed: the results of the
    others are those of the trace.
    """
    decompose, run_node = torch.export.ExportedProgram.run_decompositions, torch.fx.Interpreter.run_node
    traced: dict[torch.fx.Node, tuple[Any, ...]] = {}

    def decompose_if_needed(program: Any, table: dict[Any, Any], **options: Any) -> Any:
        operators = {node.target for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
        if any(operator in table or operator._schema.is_mutable for operator in operators):
            return decompose(program, table, **options)
        traced.update((node, _call(node)) for node in program.graph.nodes if node.op == "call_function")
        return program

    def run_if_changed(interpreter: Any, node: torch.fx.Node) -> Any:
        if "val" in node.meta and traced.get(node) == _call(node):
            return node.meta["val"]
        return run_node(interpreter, node)

    torch.export.ExportedProgram.run_decompositions = decompose_if_needed
    torch.fx.Interpreter.run_node = run_if_changed
    try:
        yield
    finally:
        torch.export.ExportedProgram.run_decompositions = decompose
        torch.fx.Interpreter.run_node = run_node


def _call(node: torch.fx.Node) -> tuple[Any, ...]:
    return node.target, node.args, node.kwargs
