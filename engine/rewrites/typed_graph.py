"""Makes the typed graph that a backend builds from a portable graph: fusions, types, weights by name."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import onnx_ir as ir

from ...runtime.format.bundle import Bundle
from ...runtime.format.weights import WeightRecord, WeightTable, read_weight
from .attention import DECOMPOSABLE, fuse_attention, is_spatial_attention, is_transformer_attention
from .group_norm import fuse_group_norm
from .precision import Islands, assign_types

IR_VERSION = 11

Fuse = Callable[[ir.Model], object]
"""Replaces patterns with operators of a backend."""


def fuse_for_tensorrt(model: ir.Model, temporal: bool = True) -> None:
    """Fuses every pattern that TensorRT has an operator for; `temporal` includes attention over time.

    Every Attention may be split: otherwise TensorRT refuses a graph with an attention that no kernel fits.
    """
    fuse_attention(model, is_transformer_attention if temporal else is_spatial_attention)
    for node in model.graph:
        if node.op_type == "Attention":
            node.attributes[DECOMPOSABLE] = ir.AttrInt64(DECOMPOSABLE, 1)
    fuse_group_norm(model)


def typed_graph(
    bundle: Bundle,
    graph: str,
    precision: str,
    fuse: Fuse = fuse_for_tensorrt,
    islands: Islands = lambda node: False,
    low_norms: bool = False,
) -> ir.Model:
    """Returns a graph of the bundle in a precision. Height, width and frames stay symbolic, weights unread.

    Args:
        bundle: the bundle.
        graph: name of the graph.
        precision: fp16, bf16 or fp32.
        fuse: replaces patterns with operators of the backend.
        islands: whether a node stays in fp32, besides those that always do.
        low_norms: whether fused group norms take and give the low precision even if a SiLU follows.
    """
    model = ir.load(bundle.folder / bundle.graph(graph).path)
    _read_hard_links(model)
    fuse(model)
    assign_types(model, precision, islands, low_norms)
    model.ir_version = IR_VERSION
    return model


def _read_hard_links(model: ir.Model) -> None:
    """Reads weights in hard-linked files without onnx-ir, which refuses them.

    A bundle in a hub's cache is used through hard links; its files have been compared with their checksums.
    """
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and _has_links(Path(tensor.path)):
            value.const_value = ir.LazyTensor(
                partial(_read, tensor), dtype=tensor.dtype, shape=ir.Shape(tensor.shape), name=value.name
            )


def _has_links(path: Path) -> bool:
    return path.exists() and path.stat().st_nlink > 1


def _read(tensor: ir.ExternalTensor) -> ir.Tensor:
    """Reads a weight from its file."""
    values = read_weight(tensor.path, tensor.dtype.numpy(), tensor.offset or 0, tensor.shape.numpy())
    return ir.Tensor(values, dtype=tensor.dtype)


def write_typed(model: ir.Model, path: Path) -> None:
    """Writes a typed graph and, beside it, its weights, with one weight in memory at a time."""
    ir.save(model, path, external_data=f"{path.stem}.weights", size_threshold_bytes=1024)


def weight_table(bundle: Bundle, graph: str, typed: ir.Model) -> WeightTable:
    """Finds the weights of a typed graph in the bundle, without constants, which have no checkpoint name."""
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
