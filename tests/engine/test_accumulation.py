"""The pattern that asks TensorRT for fp32 sums of fp16 products."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from sparsectrl_lcm.engine.check import round_results, run_portable
from sparsectrl_lcm.engine.rewrites.accumulation import LONG_SUM, accumulate_in_fp32

LENGTH = 512


def graph(dtype: type = np.float16) -> onnx.ModelProto:
    """Two products of one input, of which one has a bias; a 3x3 and a 1x1 convolution; all of 512 channels."""
    random = np.random.default_rng(0)
    shapes = {"q": (LENGTH, 4), "k": (LENGTH, 4), "bias": (4,), "three": (4, LENGTH, 3, 3), "one": (4, LENGTH, 1, 1)}
    weights = [
        numpy_helper.from_array((random.standard_normal(shape) / 64).astype(dtype), name)
        for name, shape in shapes.items()
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "q"], ["query"], name="to_q"),
        helper.make_node("MatMul", ["x", "k"], ["key_sum"], name="to_k"),
        helper.make_node("Add", ["key_sum", "bias"], ["key"], name="bias"),
        helper.make_node("Conv", ["pixels", "three", "bias"], ["image"], name="conv", pads=[1] * 4),
        helper.make_node("Conv", ["pixels", "one"], ["shortcut"], name="shortcut"),
    ]
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    inputs = [("x", [8, LENGTH]), ("pixels", [1, LENGTH, 5, 5])]
    outputs = [("query", [8, 4]), ("key", [8, 4]), ("image", [1, 4, 5, 5]), ("shortcut", [1, 4, 5, 5])]
    made = [[helper.make_tensor_value_info(name, kind, shape) for name, shape in some] for some in (inputs, outputs)]
    return helper.make_model(
        helper.make_graph(nodes, "layers", *made, weights), opset_imports=[helper.make_opsetid("", 21)], ir_version=10
    )


def rewritten(model: onnx.ModelProto, shortest: int = 256) -> tuple[onnx.ModelProto, int]:
    typed = ir.from_proto(model)
    count = accumulate_in_fp32(typed, shortest)
    result = ir.to_proto(typed)
    onnx.checker.check_model(result, full_check=True)
    return result, count


def test_long_sums_are_in_fp32_between_casts_of_their_own() -> None:
    model, count = rewritten(graph())
    assert count == 3
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    types = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    made_by = {node.output[0]: node for node in model.graph.node}
    users = {name: node for node in model.graph.node for name in node.input}
    for node in model.graph.node:
        if node.name in ("to_q", "to_k", "conv"):
            casts = [made_by[name] for name in node.input]
            assert [cast.op_type for cast in casts] == ["Cast"] * len(node.input)
            assert types[node.output[0]] == TensorProto.FLOAT
            assert users[node.output[0]].op_type == "Cast", "before a bias or anything else"
            assert all(list(model.graph.node).count(users[cast.output[0]]) == 1 for cast in casts)
    assert "bias" in users["key_sum"].name, "the bias of a product is added in fp16"


def test_names_of_weights_and_results_stay_and_weights_stay_fp16() -> None:
    model, _ = rewritten(graph())
    before = graph()
    assert {item.name for item in model.graph.initializer} == {item.name for item in before.graph.initializer}
    assert all(item.data_type == TensorProto.FLOAT16 for item in model.graph.initializer)
    assert [item.name for item in model.graph.output] == [item.name for item in before.graph.output]


def test_results_are_those_of_exact_sums() -> None:
    random = np.random.default_rng(1)
    inputs = {"x": random.standard_normal((8, LENGTH)), "pixels": random.standard_normal((1, LENGTH, 5, 5))}
    inputs = {name: value.astype(np.float16) for name, value in inputs.items()}
    model, _ = rewritten(graph())
    names = [item.name for item in model.graph.output]
    found = dict(zip(names, ReferenceEvaluator(model).run(None, inputs), strict=True))
    weights = {item.name: numpy_helper.to_array(item).astype(np.float64) for item in model.graph.initializer}
    exact = {"query": inputs["x"] @ weights["q"], "key": inputs["x"] @ weights["k"] + weights["bias"]}
    for name, value in exact.items():
        assert found[name].dtype == np.float16
        np.testing.assert_allclose(found[name].astype(np.float64), value, atol=2e-3)


@pytest.mark.parametrize(("dtype", "shortest"), [(np.float32, 256), (np.float16, 10**6)])
def test_other_types_and_short_sums_stay_as_they_are(dtype: type, shortest: int) -> None:
    model, count = rewritten(graph(dtype), shortest)
    assert count == 0
    assert [node.op_type for node in model.graph.node] == [node.op_type for node in graph(dtype).graph.node]


@pytest.mark.parametrize(("inputs", "count"), [(64, 1), (63, 0)])
def test_a_transposed_convolution_adds_four_products_of_each_channel(inputs: int, count: int) -> None:
    """Its 4x4 kernel with stride 2 meets each result with 2x2 of its 16 numbers."""
    weight = numpy_helper.from_array(np.ones((inputs, 4, 4, 4), np.float16), "w")
    node = helper.make_node(
        "ConvTranspose", ["x", "w"], ["y"], name="up", kernel_shape=[4, 4], strides=[2, 2], pads=[1] * 4
    )
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT16, shape)
        for name, shape in (("x", [1, inputs, 5, 5]), ("y", [1, 4, 10, 10]))
    ]
    made = helper.make_graph([node], "up", ends[:1], ends[1:], [weight])
    model, found = rewritten(helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))
    assert found == count
    assert [each.op_type for each in model.graph.node].count("Cast") == 3 * count
    (result,) = ReferenceEvaluator(model).run(None, {"x": np.ones((1, inputs, 5, 5), np.float16)})
    assert result.max() == 4 * inputs, "the number of products of a result inside the image"


def test_a_graph_with_casts_around_its_sums_can_be_checked(tmp_path: Path) -> None:
    """The casts declare the type of their results, which becomes fp32 when the check rounds them itself."""
    low = ir.TensorType(ir.DataType.FLOAT16)
    x = ir.Value(name="x", type=low, shape=ir.Shape([2, LONG_SUM]))
    weight = ir.Value(name="w", const_value=ir.tensor(np.ones((LONG_SUM, 3), np.float16), name="w"))
    product = ir.node("MatMul", [x, weight], name="product")
    result = ir.node("Neg", [product.outputs[0]], name="result")
    product.outputs[0].name, result.outputs[0].name, result.outputs[0].type = "p", "y", low
    graph = ir.Graph([x], result.outputs, nodes=[product, result], initializers=[weight], opset_imports={"": 20})
    model = ir.Model(graph, ir_version=10)
    assert accumulate_in_fp32(model) == 1
    round_results(model)
    ir.save(model, tmp_path / "rounded.onnx")
    (outputs,) = run_portable(tmp_path / "rounded.onnx", {"x": np.ones((2, LONG_SUM), np.float32)})
    np.testing.assert_array_equal(outputs["y"], np.full((2, 3), -LONG_SUM))
