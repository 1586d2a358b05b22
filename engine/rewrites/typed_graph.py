"""From a portable graph to the typed one that a GPU backend builds: fusions, types, weights by their names."""

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

from ...runtime.format.bundle import Bundle
from ...runtime.format.weights import WeightRecord, WeightTable
from . import attention
from .types import Islands, assign_types

IR_VERSION = 11

Fuse = Callable[[ir.Model], object]
"""Puts the operators of a backend in the place of patterns."""


def typed_graph(
    bundle: Bundle,
    graph: str,
    precision: str,
    fuse: Fuse = attention.fuse_for_tensorrt,
    islands: Islands = lambda node: False,
) -> ir.Model:
    """A graph of the bundle in a precision; height, width and frames are still symbolic, weights unread.

    Args:
        bundle: the bundle.
        graph: name of the graph.
        precision: fp16, bf16 or fp32.
        fuse: puts the operators of a backend in the place of patterns.
        islands: which nodes stay in fp32 besides those that do so always.
    """
    model = ir.load(bundle.folder / bundle.graph(graph).path)
    fuse(model)
    assign_types(model, precision, islands)
    model.ir_version = IR_VERSION
    return model


def write_typed(model: ir.Model, path: Path) -> None:
    """Writes a typed graph with its weights beside it, one weight in memory at a time."""
    ir.save(model, path, external_data=f"{path.stem}.weights", size_threshold_bytes=1024)


def weight_table(bundle: Bundle, graph: str, typed: ir.Model) -> WeightTable:
    """Where the bundle holds the weights of a typed graph; constants have no checkpoint name and are not among them."""
    portable = ir.load(bundle.folder / bundle.graph(graph).path)
    records = {}
    for name, value in typed.graph.initializers.items():
        original = portable.graph.initializers.get(name)
        source = original.const_value if original is not None else None
        dtype = value.const_value.dtype if value.const_value is not None else None
        if "." in name and isinstance(source, ir.ExternalTensor) and dtype in _PRECISIONS:
            path = Path(bundle.graph(graph).path).parent / source.location
            records[name] = WeightRecord(
                path=path.as_posix(),
                offset=source.offset or 0,
                shape=tuple(int(size) for size in source.shape),
                precision=_PRECISIONS[dtype],
            )
    return WeightTable(records)


_PRECISIONS = {ir.DataType.FLOAT: "fp32", ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}
