"""Group norms as ONNX Runtime's GroupNorm: the CPU has no kernel for it, so its definition is run, and compared."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from sparsectrl_lcm.engine.check import random_inputs, run_portable
from sparsectrl_lcm.engine.comparison import measure
from sparsectrl_lcm.engine.onnxruntime_cuda import fuse
from sparsectrl_lcm.engine.rewrites import nhwc_group_norm as nhwc
from sparsectrl_lcm.engine.rewrites.group_norm import fuse_group_norm
from sparsectrl_lcm.engine.rewrites.node_helpers import Rewriting
from sparsectrl_lcm.engine.rewrites.typed_graph import typed_graph, write_typed
from sparsectrl_lcm.runtime.format.bundle import Bundle

CPU = ["CPUExecutionProvider"]
NORMS = {"unet": (39, 23), "controlnet_scribble": (16, 10), "vae_encoder": (14, 13), "vae_decoder": (22, 21)}
"""Group norms of the demo bundle's graphs, and how many of them have a SiLU after them."""


def saved(model: ir.Model, path: Path) -> Path:
    ir.save(model, path)
    return path


def single(dtype: ir.DataType, activation: int) -> ir.Model:
    """A graph of one GroupNorm: y [N, H, W, C] = norm(x), in groups of four channels."""
    x = ir.Value(name="x", type=ir.TensorType(dtype), shape=ir.Shape([2, 3, 5, 24]))
    parameters = [ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([24])) for name in "ab"]
    options = {"groups": 6, "epsilon": 1e-2, "activation": activation, "channels_last": 1}
    node = ir.node("GroupNorm", [x, *parameters], options, domain="com.microsoft", name="norm")
    y = node.outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(dtype), x.shape
    imports = {"": 21, "com.microsoft": 1}
    return ir.Model(ir.Graph([x, *parameters], [y], nodes=[node], opset_imports=imports, name="g"), ir_version=10)


@pytest.mark.parametrize("activation", [0, 1])
@pytest.mark.parametrize("low", [False, True])
def test_the_definition_is_torchs_group_norm(low: bool, activation: int, tmp_path: Path) -> None:
    model = single(ir.DataType.FLOAT16 if low else ir.DataType.FLOAT, activation)
    assert nhwc.define_group_norms(model) == 1
    generator = np.random.default_rng(0)
    x = (3 + 2 * generator.standard_normal((2, 3, 5, 24))).astype(np.float16 if low else np.float32)
    a, b = generator.standard_normal((2, 24)).astype(np.float32)
    session = onnxruntime.InferenceSession(saved(model, tmp_path / "defined.onnx"), providers=CPU)
    (y,) = session.run(None, {"x": x, "a": a, "b": b})
    images = torch.from_numpy(x.astype(np.float32)).permute(0, 3, 1, 2)
    expected = torch.nn.functional.group_norm(images, 6, torch.from_numpy(a), torch.from_numpy(b), 1e-2)
    if activation:
        expected = torch.nn.functional.silu(expected)
    assert y.dtype == x.dtype
    np.testing.assert_allclose(y, expected.permute(0, 2, 3, 1).numpy(), atol=2e-3 if low else 1e-5)


@pytest.mark.parametrize("graph", NORMS)
def test_every_group_norm_is_fused_and_gives_the_same(graph: str, tmp_path: Path) -> None:
    bundle = Bundle.load()
    model = typed_graph(bundle, graph, "fp32", fuse)
    count = Counter(node.op_type for node in model.graph)
    norms = [node for node in model.graph if node.op_type == "GroupNorm"]
    with_silu = sum(node.attributes["activation"].as_int() for node in norms)
    assert (len(norms), with_silu) == NORMS[graph]
    assert count["InstanceNormalization"] == count["GroupNormalization"] == 0
    nhwc.define_group_norms(model)
    feeds = random_inputs(bundle, graph)
    (expected,) = run_portable(bundle.folder / bundle.graph(graph).path, feeds)
    write_typed(model, tmp_path / "defined.onnx")
    (actual,) = run_portable(tmp_path / "defined.onnx", feeds)
    for name, values in expected.items():
        assert measure(actual[name], values).error < (1e-2 if values.dtype == np.uint8 else 1e-5), name


def test_norms_take_and_give_fp16_with_weights_in_fp32(tmp_path: Path) -> None:
    """The kernel takes no other weights. ONNX Runtime accepts every type and shape, and misses the kernel alone."""
    model = typed_graph(Bundle.load(), "unet", "fp16", fuse)
    for node in model.graph:
        if node.op_type == "GroupNorm":
            dtypes = [value.const_value.dtype for value in node.inputs[1:] if value and value.const_value]
            assert dtypes == [ir.DataType.FLOAT] * 2
            assert node.inputs[0].producer().op_type != "Cast", node.name  # type: ignore[union-attr]
    write_typed(model, tmp_path / "unet.onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    with pytest.raises(Exception, match=r"NOT_IMPLEMENTED .*kernel for com.microsoft.GroupNorm"):
        onnxruntime.InferenceSession(tmp_path / "unet.onnx", options, providers=CPU)


def test_groups_that_the_kernel_cannot_compute_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    assert nhwc.has_kernel(channels=320, groups=32)
    assert not nhwc.has_kernel(channels=27, groups=9), "threads compute pairs of channels"
    monkeypatch.setattr(nhwc, "_LARGEST_GROUP", 6)
    model = typed_graph(Bundle.load(), "controlnet_scribble", "fp32", fuse)
    groups = [node.inputs[1].const_value.shape[0] for node in model.graph if node.op_type == "GroupNorm"]  # type: ignore[union-attr]
    assert set(groups) == {32, 48}, "8 groups of 4 and 6 channels"
    assert sum(node.op_type == "InstanceNormalization" for node in model.graph) == 16 - len(groups) > 0


def with_innermost_channels(model: ir.Model) -> ir.Model:
    """Puts stand-ins with channels innermost in the place of convolutions, as `prefer_nhwc` does, and of GroupNorms."""
    for node in list(model.graph):
        if node.op_type not in ("Conv", "GroupNorm"):
            continue
        convolution = node.op_type == "Conv"
        shape = node.inputs[1].const_value.shape  # type: ignore[union-attr]
        outputs, inputs = (int(shape[0]), int(shape[1])) if convolution else (int(shape[0]),) * 2
        rewriting = Rewriting(model.graph, f"{node.name}.stand_in")
        value = rewriting.op("Transpose", node.inputs[0], perm=[0, 2, 3, 1]) if convolution else node.inputs[0]
        weight = rewriting.constant(np.ones((inputs, outputs), np.float32))
        value = rewriting.op("FusedMatMul", value, weight, domain="com.microsoft")
        rewriting.replace(node, rewriting.op("Transpose", value, perm=[0, 3, 1, 2]) if convolution else value)
    model.graph.opset_imports["com.microsoft"] = 1
    return model


def test_transposes_around_norms_and_convolutions_cancel(tmp_path: Path) -> None:
    """ONNX Runtime's optimizer removes most of them; 10 belong to the one attention, and 8 to upsampling."""

    def left(fuse_norms: Callable[[ir.Model], object]) -> int:
        model = with_innermost_channels(typed_graph(Bundle.load(), "vae_decoder", "fp32", fuse_norms))
        write_typed(model, tmp_path / "graph.onnx")
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        onnxruntime.InferenceSession(tmp_path / "graph.onnx", options, providers=CPU)
        optimized = onnx.load(tmp_path / "optimized.onnx", load_external_data=False)
        return sum(node.op_type == "Transpose" for node in optimized.graph.node)

    assert left(fuse) <= 20
    assert left(fuse_group_norm) > 60, "norms with channels first need them at every convolution"


@pytest.mark.parametrize("graph", ["vae_decoder", "vae_encoder"])
def test_the_norm_of_a_vaes_attention_is_one_of_images(graph: str, tmp_path: Path) -> None:
    """TensorRT-RTX splits a norm of flattened images into three kernels, with fp32 between them."""
    bundle = Bundle.load()
    model = typed_graph(bundle, graph, "fp32", fuse_group_norm)
    norms = [node for node in model.graph if node.op_type == "GroupNormalization"]
    sources = [norm.inputs[0].producer() for norm in norms if norm.inputs[0] is not None]
    assert len(norms) == NORMS[graph][0]
    assert {node.op_type for node in sources if node is not None} == {"Conv", "Div"}
    write_typed(model, tmp_path / "graph.onnx")
    feeds = random_inputs(bundle, graph)
    (expected,) = run_portable(bundle.folder / bundle.graph(graph).path, feeds)
    (actual,) = run_portable(tmp_path / "graph.onnx", feeds)
    for name, values in expected.items():
        assert np.allclose(
            actual[name].astype(float), values.astype(float), atol=1e-4 if values.dtype != np.uint8 else 1
        )
