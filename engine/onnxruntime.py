"""Engines for ONNX Runtime's CPU: spatial self-attention as one operator that never holds all of its scores.

At 512x512 and 16 frames the scores of one attention of the portable graph take 8.6 GB; com.microsoft's
MultiHeadAttention computes them block by block (Dao et al. 2022, arXiv:2205.14135).
"""

from pathlib import Path

import onnx_ir as ir
import onnxruntime
from onnx_ir.passes import common

from ..runtime.bundle import Bundle
from ..runtime.engines import engine_key, writable_engine_folder, write_index
from ..runtime.errors import BackendError

BACKEND = "onnxruntime"
_DOMAIN = "com.microsoft"


def build(bundle: Path) -> dict[str, int]:
    """Writes an engine for each graph with spatial attention; returns how many attentions were fused in each.

    The engines hold no weights: they share the bundle's.

    Raises:
        BundleError: `bundle` is not a bundle.
        BackendError: the engines cannot be written.
    """
    opened = Bundle.load(bundle)
    fused, keys = {}, {}
    try:
        folder = writable_engine_folder(opened.folder, BACKEND)
        for name, record in opened.manifest.graphs.items():
            model = ir.load(opened.folder / record.path)
            count = fuse_spatial_attention(model)
            if not count:
                continue
            ir.save(model, folder / f"{name}.onnx")
            fused[name] = count
            keys[name] = engine_key(opened.manifest, name, BACKEND, onnxruntime.__version__)
        write_index(folder, keys)
    except OSError as error:
        raise BackendError(f"backend: the engines of {str(bundle)!r} cannot be written: {error.strerror}") from error
    return fused


def fuse_spatial_attention(model: ir.Model) -> int:
    """Replaces the self-attention of every spatial transformer by MultiHeadAttention; returns how many."""
    softmaxes = [node for node in model.graph if node.op_type == "Softmax" and _is_spatial(node.name or "")]
    for softmax in softmaxes:
        scores = _producer(softmax.inputs[0])
        mixed = _only_user(softmax)
        merged = _only_user(_only_user(mixed))
        (query, heads), (key, _), (value, _) = map(_before_heads, (*scores.inputs, mixed.inputs[1]))
        attention = ir.node(
            "MultiHeadAttention", [query, key, value], {"num_heads": heads}, domain=_DOMAIN, name=softmax.name
        )
        model.graph.insert_after(merged, attention)
        merged.outputs[0].replace_all_uses_with(attention.outputs[0])
    if softmaxes:
        model.graph.opset_imports[_DOMAIN] = 1
        common.RemoveUnusedNodesPass()(model)
    return len(softmaxes)


def _is_spatial(name: str) -> bool:
    return ".attentions." in name and ".attn1/" in name


def _producer(value: ir.Value | None) -> ir.Node:
    node = value.producer() if value is not None else None
    assert node is not None
    return node


def _only_user(node: ir.Node) -> ir.Node:
    (use,) = node.outputs[0].uses()
    return use.node


def _before_heads(value: ir.Value | None) -> tuple[ir.Value, int]:
    """Walks from a [B, heads, S, d] tensor back to its projection [B, S, heads*d], and reads the number of heads."""
    heads = 0
    while (node := _producer(value)).op_type in ("Mul", "Transpose", "Reshape"):
        if node.op_type == "Reshape" and (found := _heads(node)):
            heads = found
        value = node.inputs[0]
    assert value is not None
    assert heads
    return value, heads


def _heads(reshape: ir.Node) -> int:
    """The third size of a reshape to [B, S, heads, d], where it is a constant."""
    shape = reshape.inputs[1].producer() if reshape.inputs[1] is not None else None
    if shape is None or shape.op_type != "Concat" or len(shape.inputs) != 4:
        return 0
    size = shape.inputs[2]
    return int(size.const_value.numpy()[0]) if size is not None and size.const_value is not None else 0
