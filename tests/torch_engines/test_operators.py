"""Each operator in torch against ONNX Runtime on the same node."""

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from .fusions import DOMAIN, fuse
from .operators import OPERATORS
from .programs import compile_graph, to_torch

OPSET, IR_VERSION = 23, 11
RANDOM = np.random.default_rng(0)
INTS = np.int64

Inputs = list[np.ndarray]


def values(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def positive(*shape: int) -> np.ndarray:
    return np.abs(values(*shape)) + np.float32(0.5)


def ints(*numbers: int) -> np.ndarray:
    return np.array(numbers, INTS)


def number(value: Any, dtype: Any = np.float32) -> np.ndarray:
    return np.array(value, dtype)


NEAREST = {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}
NONE = np.zeros(0, np.float32)
CASES: list[tuple[str, dict[str, Any], Inputs, Inputs]] = [
    *((name, {}, [positive(2, 3)], []) for name in ("Cos", "Exp", "Reciprocal", "Sigmoid", "Sin", "Sqrt", "Tanh")),
    *((name, {}, [values(2, 3), positive(2, 1)], []) for name in ("Add", "Div", "Max", "Min", "Mul", "Sub")),
    *((name, {}, [values(2, 3)], [number([2.5])]) for name in ("Add", "Div", "Mul")),
    ("Equal", {}, [ints(1, 2, 3)], [ints(2)]),
    ("Where", {}, [values(3, 1) > 0, values(3, 4)], [number([2.5])]),
    ("Relu", {}, [values(4, 4)], []),
    ("Equal", {}, [ints(0, 1, 0, 3)], [number(0, INTS)]),
    ("Where", {}, [np.array([[True], [False]]), values(2, 3), values(1, 3)], []),
    ("Round", {}, [np.array([-1.5, -0.5, 0.5, 1.5, 2.4], np.float32)], []),
    *(("Cast", {"to": kind}, [10 * positive(3, 4)], []) for kind in (1, 2, 7, 10)),
    *(("Gelu", {"approximate": kind}, [values(3, 4)], []) for kind in ("none", "tanh")),
    ("Softmax", {"axis": -1}, [values(2, 3, 4)], []),
    ("MatMul", {}, [values(2, 3, 4), values(4, 5)], []),
    ("Gemm", {"transB": 1}, [values(2, 4), values(5, 4), values(5)], []),
    ("Gemm", {}, [values(2, 4), values(4, 5), values(5)], []),
    ("Conv", {"pads": [1, 1, 1, 1], "strides": [2, 2]}, [values(2, 3, 8, 6), values(4, 3, 3, 3), values(4)], []),
    ("Conv", {}, [values(2, 4, 8, 6), values(4, 4, 1, 1)], []),
    ("Attention", {"scale": 0.3}, [values(2, 3, 7, 8), values(2, 3, 5, 8), values(2, 3, 5, 8)], []),
    ("MultiHeadAttention", {"num_heads": 3, "scale": 0.3}, [values(2, 7, 12), values(2, 7, 12), values(2, 7, 12)], []),
    ("LayerNormalization", {"axis": -1, "epsilon": 1e-5}, [values(2, 3, 8), values(8), values(8)], []),
    ("GroupNormalization", {"num_groups": 2, "epsilon": 1e-5}, [values(2, 8, 3, 3), values(8), values(8)], []),
    ("InstanceNormalization", {"epsilon": 1e-5}, [values(2, 4, 9), values(4), values(4)], []),
    ("ReduceMean", {"keepdims": 1}, [values(2, 3, 4)], [ints(1, 2)]),
    ("Reshape", {"allowzero": 0}, [values(2, 3, 4)], [ints(0, -1)]),
    ("Expand", {}, [values(2, 1, 4)], [ints(3, 1, 5, 1)]),
    ("Transpose", {"perm": [2, 0, 1]}, [values(2, 3, 4)], []),
    ("Squeeze", {}, [values(1, 3, 1)], [ints(0)]),
    ("Squeeze", {}, [values(1, 3, 1)], []),
    ("Unsqueeze", {}, [values(3, 4)], [ints(0, -1)]),
    ("Concat", {"axis": 1}, [values(2, 3), values(2, 4)], []),
    ("Split", {"axis": 1, "num_outputs": 2}, [values(2, 6)], []),
    ("Slice", {}, [values(6, 5)], [ints(1), ints(2**62)]),
    ("Slice", {}, [values(6, 5)], [ints(-3, 0), ints(-1, 4), ints(0, 1), ints(1, 2)]),
    ("Gather", {"axis": 0}, [values(5, 3), np.array([[4, 0], [2, 2]], INTS)], []),
    ("Gather", {"axis": 1}, [values(2, 5), number(3, INTS)], []),
    ("Pad", {"mode": "constant"}, [values(1, 2, 3, 4)], [ints(0, 0, 0, 0, 0, 0, 1, 2), number(0.0)]),
    ("Resize", NEAREST, [values(1, 2, 3, 4)], [NONE, np.array([1, 1, 2, 2], np.float32)]),
    ("Range", {}, [], [number(0.0), number(5.0), number(1.0)]),
    ("Shape", {"start": 1}, [values(2, 3, 4)], []),
]


def node_model(op_type: str, attributes: dict[str, Any], inputs: Inputs, known: Inputs) -> onnx.ModelProto:
    """A model of one node; inputs with values that are known before a run become initialisers."""
    domain = "com.microsoft" if op_type == "MultiHeadAttention" else ""
    names = [f"input{place}" for place in range(len(inputs) + len(known))]
    given = [name if array is not NONE else "" for name, array in zip(names, [*inputs, *known], strict=True)]
    outputs = [f"output{place}" for place in range(attributes.get("num_outputs", 1))]
    node = onnx.helper.make_node(op_type, given, outputs, domain=domain, **attributes)
    graph = onnx.helper.make_graph(
        [node],
        "node",
        [
            onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in zip(names, inputs, strict=False)
        ],
        [onnx.helper.make_empty_tensor_value_info(name) for name in outputs],
        [
            onnx.numpy_helper.from_array(array, name)
            for name, array in zip(names[len(inputs) :], known, strict=True)
            if array is not NONE
        ],
    )
    opsets = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid("com.microsoft", 1)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Runs a model with torch, all initialisers as constants."""
    program = compile_graph(model, {name: array.shape for name, array in feeds.items()}, {})
    tensors = {**program.constants, **{name: torch.from_numpy(array) for name, array in feeds.items()}}
    results: dict[str, Any] = {name: Result() for name in program.outputs}
    program.run({**tensors, **program.known_outputs}, results)
    return {name: result.values.numpy() for name, result in results.items()}


class Result:
    """Stands for an output whose shape is not known."""

    def copy_(self, found: torch.Tensor) -> None:
        self.values = found


@pytest.mark.parametrize("op_type, attributes, inputs, known", CASES, ids=lambda value: value if value else "")
def test_an_operator_gives_what_onnxruntime_gives(
    op_type: str, attributes: dict[str, Any], inputs: Inputs, known: Inputs
) -> None:
    model = node_model(op_type, attributes, inputs, known)
    feeds = {f"input{place}": array for place, array in enumerate(inputs)}
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = run(ir.from_proto(model), feeds)
    for expected, actual in zip(session.run(None, feeds), found.values(), strict=True):
        assert actual.dtype == expected.dtype
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_every_operator_has_a_case() -> None:
    assert OPERATORS.keys() == {case[0] for case in CASES} | {"Linear", "Silu"}


FUSED = """
<ir_version: 11, opset_import: ["": 23]>
g (float16[2, 6, 8] x) => (float16[2, 6, 5] y) {
    wide = Cast <to = 1> (x)
    norm = LayerNormalization <axis = -1, epsilon = 1e-5> (wide, scale, shift)
    narrow = Cast <to = 10> (norm)
    gate = Sigmoid (narrow)
    silu = Mul (narrow, gate)
    product = MatMul (silu, weight)
    y = Add (product, bias)
}
"""


def test_fused_operators_give_what_they_replace() -> None:
    model = ir.from_onnx_text(FUSED)
    arrays = {"scale": values(8), "shift": values(8), "weight": values(8, 5), "bias": values(5)}
    for name in ("weight", "bias"):
        arrays[name] = arrays[name].astype(np.float16)
    for name, array in arrays.items():
        value = next(item for node in model.graph for item in node.inputs if item is not None and item.name == name)
        value.const_value = ir.tensor(array, name=name)
        model.graph.initializers[name] = value
    feeds = {"x": values(2, 6, 8).astype(np.float16)}
    expected = run(model, feeds)["y"].astype(np.float32)
    assert fuse(model) == {"scale", "shift"}
    assert [node.op_type for node in model.graph] == ["LayerNormalization", "Silu", "Linear"]
    assert {node.domain for node in model.graph} == {"", DOMAIN}
    for name in ("scale", "shift"):
        model.graph.initializers[name].const_value = ir.tensor(arrays[name].astype(np.float16), name=name)
    actual = run(model, feeds)["y"].astype(np.float32)
    np.testing.assert_allclose(actual, expected, atol=2e-2 * np.abs(expected).max())


def test_bfloat16_keeps_its_bits() -> None:
    upper = (values(4).view(np.uint32) >> 16).astype(np.uint16)
    tensor = to_torch(ir.Tensor(upper, dtype=ir.DataType.BFLOAT16).numpy(), ir.DataType.BFLOAT16)
    np.testing.assert_array_equal(tensor.float().numpy().view(np.uint32) >> 16, upper)
