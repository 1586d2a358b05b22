"""Engines for ONNX Runtime on the CPU, with spatial self-attention fused into one operator.

The portable graph holds the full score matrix: 8.6 GB for one attention at 512x512 and 16 frames. com.microsoft's
MultiHeadAttention computes the scores block by block (Dao et al. 2022, arXiv:2205.14135).
"""

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import onnxruntime
from onnx_ir.passes import common

from ..runtime.format.build_options import BuildOptions, OnBuildProgress
from ..runtime.format.bundle import Bundle
from ..runtime.format.engine_keys import EngineIndex, EngineRecord, EngineSpec
from .engine_writer import SetBuild, any_size_spec, engine_record, write_set
from .rewrites.attention import attention_scale, is_spatial_self_attention, only_user, producer, softmaxes

_DOMAIN = "com.microsoft"


def build(bundle: Bundle, backend: str, options: BuildOptions, on_progress: OnBuildProgress) -> EngineIndex:
    """Writes an engine for each graph with spatial self-attention, and the number of fused attentions in its report.

    The engines share the weights of the bundle.

    Raises:
        BackendError: the engines cannot be written.
    """

    def load(graph: str) -> ir.Model:
        return ir.load(bundle.folder / bundle.graph(graph).path)

    def spec(graph: str) -> EngineSpec:
        return any_size_spec(bundle, graph, backend, "fp32", onnxruntime.__version__)

    def make(graph: str, folder: Path, report: OnBuildProgress) -> EngineRecord:
        report("fusing attention", 0.0)
        model = load(graph)
        count = fuse_spatial_attention(model)
        ir.save(model, folder / f"{graph}.onnx")
        return engine_record(folder / f"{graph}.onnx", spec(graph), {"attention fused": count})

    index = EngineIndex(backend=backend, precision="fp32", engines={})
    graphs = [graph for graph in bundle.manifest.graphs if softmaxes(load(graph), is_spatial_self_attention)]
    return write_set(bundle, SetBuild(index, graphs, spec, make), options, on_progress)


def fuse_spatial_attention(model: ir.Model) -> int:
    """Replaces the self-attention of every spatial transformer with MultiHeadAttention; returns how many."""
    return fuse_multi_head_attention(model, is_spatial_self_attention)


def fuse_multi_head_attention(model: ir.Model, belongs: Callable[[str], bool]) -> int:
    """Replaces every self-attention for whose node name `belongs` is true; returns how many."""
    found = softmaxes(model, belongs)
    for softmax in found:
        scores = producer(softmax.inputs[0])
        mixed = only_user(softmax)
        merged = only_user(only_user(mixed))
        (query, heads), (key, _), (value, _) = map(_before_heads, (*scores.inputs, mixed.inputs[1]))
        options = {"num_heads": heads, "scale": attention_scale(scores)}
        attention = ir.node("MultiHeadAttention", [query, key, value], options, domain=_DOMAIN, name=softmax.name)
        model.graph.insert_after(merged, attention)
        merged.outputs[0].replace_all_uses_with(attention.outputs[0])
    if found:
        model.graph.opset_imports[_DOMAIN] = 1
        common.RemoveUnusedNodesPass()(model)
    return len(found)


def _before_heads(value: ir.Value | None) -> tuple[ir.Value, int]:
    """Walks back from a tensor [B, heads, S, d]; returns its projection [B, S, heads*d] and the number of heads."""
    heads = 0
    while (node := producer(value)).op_type in ("Mul", "Transpose", "Reshape"):
        if node.op_type == "Reshape" and (found := _heads(node)):
            heads = found
        value = node.inputs[0]
    assert value is not None
    assert heads
    return value, heads


def _heads(reshape: ir.Node) -> int:
    """Returns `heads` of a reshape to [B, S, heads, d]; 0 if it is not a constant."""
    shape = reshape.inputs[1].producer() if reshape.inputs[1] is not None else None
    if shape is None or shape.op_type != "Concat" or len(shape.inputs) != 4:
        return 0
    size = shape.inputs[2]
    return int(size.const_value.numpy()[0]) if size is not None and size.const_value is not None else 0
