"""Attention in bf16 over as many positions as heads, which OpenVINO computes wrongly."""

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import openvino as ov
import pytest
from onnx import TensorProto, helper, numpy_helper
from sparsectrl_lcm.runtime.cpu import openvino_compile
from sparsectrl_lcm.runtime.cpu.openvino import OpenVinoSession, compile_options
from sparsectrl_lcm.runtime.format.manifest import GraphRecord, TensorRecord

HEADS = 4
"""Heads of temporal attention. OpenVINO 2026.4 gives wrong results for a clip with as many frames as heads."""


def attention(path: Path, heads: int, size: int) -> np.ndarray:
    """Writes a bf16 attention over projections [B, S, heads * size], as in the engines; returns its weights."""
    width = heads * size
    weight = np.random.default_rng(0).standard_normal((width, 3 * width)).astype(np.float32) / np.sqrt(width)
    low = weight.astype(ml_dtypes.bfloat16)
    held = helper.make_tensor("weight", TensorProto.BFLOAT16, low.shape, low.tobytes(), raw=True)
    shape = numpy_helper.from_array(np.array([0, 0, heads, size]), "split")
    merged = numpy_helper.from_array(np.array([0, 0, width]), "merged")
    nodes = [
        helper.make_node("Cast", ["x"], ["low"], to=TensorProto.BFLOAT16),
        helper.make_node("MatMul", ["low", "weight"], ["projected"]),
        helper.make_node("Split", ["projected"], ["q", "k", "v"], axis=2, num_outputs=3),
    ]
    for name in "qkv":
        nodes.append(helper.make_node("Reshape", [name, "split"], [f"{name}.parts"]))
        nodes.append(helper.make_node("Transpose", [f"{name}.parts"], [f"{name}.heads"], perm=[0, 2, 1, 3]))
    nodes += [
        helper.make_node("Attention", ["q.heads", "k.heads", "v.heads"], ["mixed"], scale=size**-0.5),
        helper.make_node("Transpose", ["mixed"], ["turned"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["turned", "merged"], ["joined"]),
        helper.make_node("Cast", ["joined"], ["y"], to=TensorProto.FLOAT),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, None, width]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [held, shape, merged])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11), path)
    return weight


@pytest.mark.parametrize("positions", [HEADS - 1, HEADS, HEADS + 1])
def test_attention_over_as_many_positions_as_heads(positions: int, tmp_path: Path) -> None:
    """A small case of 8 frames with the 8 heads of Stable Diffusion 1.5."""
    batch, size = 6, 8
    weight = attention(tmp_path / "g.onnx", HEADS, size)
    x = np.random.default_rng(1).standard_normal((batch, positions, HEADS * size)).astype(np.float32)
    record = GraphRecord(
        path="g.onnx",
        weights=(),
        inputs=(TensorRecord(name="x", dtype="float32", shape=x.shape),),
        outputs=(TensorRecord(name="y", dtype="float32", shape=x.shape),),
        max_error=0.0,
    )
    session = OpenVinoSession(tmp_path / "g.onnx", record, {"x": x.shape}, "CPU", compile_options("CPU", "bf16"))
    (actual,) = session.run({"x": x})
    query, key, value = (
        part.reshape(batch, positions, HEADS, size).transpose(0, 2, 1, 3) for part in np.split(x @ weight, 3, axis=2)
    )
    scores = np.exp(query @ key.swapaxes(2, 3) / np.sqrt(size))
    mixed = scores / scores.sum(axis=3, keepdims=True) @ value
    expected = mixed.transpose(0, 2, 1, 3).reshape(x.shape)
    assert np.abs(actual - expected).max() <= 0.05 * np.abs(expected).max()


@pytest.mark.parametrize("positions", [HEADS - 1, HEADS, HEADS + 1])
def test_no_attention_is_compiled_with_as_many_positions_as_heads(positions: int, tmp_path: Path) -> None:
    """Also fails on processors without bf16, on which OpenVINO computes in fp32 and confuses nothing."""
    attention(tmp_path / "g.onnx", HEADS, 8)
    model = ov.Core().read_model(tmp_path / "g.onnx")
    model.reshape([6, positions, HEADS * 8])
    openvino_compile._move_heads_into_batch(model)
    (found,) = [node for node in model.get_ops() if node.get_type_name() == "ScaledDotProductAttention"]
    _, heads, given, _ = found.input_value(0).shape
    assert (heads, given) == ((1, HEADS) if positions == HEADS else (HEADS, positions))
