"""The error of int8 layers against exact products, and which layers are left out."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from sparsectrl_lcm.engine import openvino
from sparsectrl_lcm.engine.check import random_inputs, run_portable
from sparsectrl_lcm.engine.quantization.layers import input_axis, is_silu, layer_input, quantizable, weight_shape
from sparsectrl_lcm.engine.quantization.number_formats import INT8
from sparsectrl_lcm.engine.quantization.observer import CHANNELS, ObservedGraph, Statistics
from sparsectrl_lcm.engine.quantization.quantize_dequantize import InputRounding, quantize
from sparsectrl_lcm.engine.quantization.smoothing import smooth
from sparsectrl_lcm.engine.rewrites.small_images import join_small_images
from sparsectrl_lcm.engine.rewrites.typed_graph import write_typed
from sparsectrl_lcm.runtime.cpu.openvino import OpenVinoSession, compile_options
from sparsectrl_lcm.runtime.format.bundle import Bundle, demo_bundle
from sparsectrl_lcm.runtime.format.clip_layout import ClipSize

CHANNELS_IN, CHANNELS_OUT, ROUNDS = 64, 48, 3
RANDOM = np.random.default_rng(0)
UNEVEN = np.where(np.arange(CHANNELS_IN) % 16 == 5, 30.0, 1.0).astype(np.float32)
"""Sizes of the input channels: four are 30 times as large as the others."""


def layer(operator: str) -> ir.Model:
    """A graph of one product or one 3x3 convolution with random weights."""
    shape = [CHANNELS_IN, CHANNELS_OUT] if operator == "MatMul" else [CHANNELS_OUT, CHANNELS_IN, 3, 3]
    array = np.random.default_rng(1).standard_normal(shape, np.float32)
    weight = ir.Value(name="layer.weight", const_value=ir.tensor(array, name="layer.weight"))
    sizes = [None, CHANNELS_IN] if operator == "MatMul" else [None, CHANNELS_IN, 5, 5]
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(sizes))
    node = ir.node(operator, [x, weight], name=f"layer/{operator}")
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[weight], opset_imports={"": 21}, name="unet")
    return ir.Model(graph, ir_version=10)


def inputs(operator: str, size: float) -> np.ndarray:
    """Random values with channels of uneven sizes."""
    rows = RANDOM.standard_normal((64, CHANNELS_IN), np.float32) * UNEVEN * size
    return rows if operator == "MatMul" else np.repeat(np.repeat(rows[:, :, None, None], 5, 2), 5, 3)


def result(model: ir.Model, path: Path, x: np.ndarray) -> dict[str, np.ndarray]:
    ir.save(model, path)
    return run_portable(path, {"x": x})[0]


def with_bias(model: ir.Model) -> ir.Model:
    """The graph with a random bias: the Add after a product, or an input of the convolution."""
    graph, node = model.graph, next(iter(model.graph))
    array = np.random.default_rng(3).standard_normal(CHANNELS_OUT, np.float32)
    bias = ir.Value(name="layer.bias", const_value=ir.tensor(array, name="layer.bias"))
    graph.register_initializer(bias)
    if node.op_type == "Conv":
        node.resize_inputs(3)
        node.replace_input_with(2, bias)
        return model
    addition = ir.node("Add", [bias, node.outputs[0]], name="layer/Add")
    node.outputs[0].name, addition.outputs[0].name = "product", "y"
    addition.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph.append(addition)
    graph.outputs[0] = addition.outputs[0]
    return model


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("operator", ["MatMul", "Conv"])
def test_the_mean_error_of_the_weight_is_taken_back(operator: str, biased: bool, tmp_path: Path) -> None:
    """Inputs with large, uneven means: no channel of the result is off on average, but at a convolution's borders."""

    def make() -> ir.Model:
        return with_bias(layer(operator)) if biased else layer(operator)

    name, means = f"layer/{operator}", RANDOM.uniform(-3, 3, CHANNELS_IN)
    x = (UNEVEN * RANDOM.normal(means, 1, (400, 5, 5, CHANNELS_IN))).astype(np.float32)
    x, axes = (x.reshape(-1, CHANNELS_IN), (0,)) if operator == "MatMul" else (np.moveaxis(x, 3, 1), (0, 2, 3))
    observed = ObservedGraph(model := make(), means=True)
    exact = result(model, tmp_path / "observed.onnx", x)
    for _ in range(2):
        observed.see(exact[CHANNELS])
    statistics = observed.statistics()
    seen = statistics[name].means
    assert seen is not None
    assert np.allclose(seen, x.mean(axes), rtol=1e-4, atol=1e-3)
    off = []
    for without in (True, False):
        found = smooth(rounded := make(), statistics)[name]
        assert quantize(rounded, {name: replace(found, means=None) if without else found}, INT8) == 1
        error = result(rounded, tmp_path / "rounded.onnx", x)["y"] - exact["y"]
        off.append(np.square(error.mean(axes) if operator == "MatMul" else error[:, :, 2, 2].mean(0)).mean())
    assert off[1] < 0.1 * off[0]


def error_of_int8(operator: str, folder: Path, smoothed: bool) -> float:
    """The relative error (root mean square) of an int8 layer that saw requests of several sizes, largest first."""
    model, batches = layer(operator), [inputs(operator, 1 / (1 + index)) for index in range(ROUNDS)]
    observed = ObservedGraph(model)
    for batch in batches:
        seen = result(model, folder / "observed.onnx", batch)
        observed.see(seen[CHANNELS])
    statistics, rounded = observed.statistics(), layer(operator)
    plain = {name: InputRounding(each.largest) for name, each in statistics.items()}
    assert quantize(rounded, smooth(rounded, statistics) if smoothed else plain, INT8) == 1
    exact = result(layer(operator), folder / "exact.onnx", batches[0])["y"]
    actual = result(rounded, folder / "rounded.onnx", batches[0])["y"]
    return float(np.sqrt(np.square(actual - exact).mean() / np.square(exact).mean()))


@pytest.mark.parametrize("operator", ["MatMul", "Conv"])
def test_int8_has_eight_bits_and_smoothing_makes_it_better(operator: str, tmp_path: Path) -> None:
    """With 4 bits the error would be 0.2, and with the range of the smallest request 0.4."""
    plain, smoothed = (error_of_int8(operator, tmp_path, smoothing) for smoothing in (False, True))
    assert 0.02 < plain < 0.035
    assert smoothed < 0.7 * plain


def after_silu(operator: str) -> ir.Model:
    """The graph of one layer whose input is the SiLU of the graph's."""
    model = layer(operator)
    node = next(iter(model.graph))
    x = node.inputs[0]
    gate = ir.node("Sigmoid", [x], name="silu/Sigmoid")
    silu = ir.node("Mul", [gate.outputs[0], x], name="silu/Mul")
    node.replace_input_with(0, silu.outputs[0])
    model.graph.insert_before(node, [gate, silu])
    return model


@pytest.mark.parametrize("operator", ["MatMul", "Conv"])
def test_inputs_after_silu_use_all_256_numbers(operator: str, tmp_path: Path) -> None:
    """SiLU gives nothing below -0.28. In signed integers nearly half of the numbers would be left over."""
    name, x = f"layer/{operator}", inputs(operator, 0.1)
    observed = ObservedGraph(model := after_silu(operator))
    exact = result(model, tmp_path / "observed.onnx", x)
    observed.see(exact[CHANNELS])
    errors = []
    for signed in (False, True):
        found = smooth(rounded := after_silu(operator), observed.statistics())[name]
        assert found.smallest is not None
        assert quantize(rounded, {name: replace(found, smallest=None) if signed else found}, INT8) == 1
        errors.append(np.abs(result(rounded, tmp_path / "rounded.onnx", x)["y"] - exact["y"]).mean())
    assert errors[0] < 0.8 * errors[1]
    assert smooth(layer(operator), {name: Statistics(np.ones(CHANNELS_IN, np.float32))})[name].smallest is None


def test_layers_with_the_same_input_share_its_division(tmp_path: Path) -> None:
    """The largest weight of both decides; a channel that is always zero gets a finite divisor."""
    model = layer("MatMul")
    first = next(iter(model.graph))
    array = 5 * np.random.default_rng(2).standard_normal((CHANNELS_IN, CHANNELS_OUT), np.float32)
    weight = ir.Value(name="other.weight", const_value=ir.tensor(array, name="other.weight"))
    model.graph.register_initializer(weight)
    second = ir.node("MatMul", [first.inputs[0], weight], name="other/MatMul")
    model.graph.append(second)
    channels = np.where(np.arange(CHANNELS_IN) == 7, 0, UNEVEN).astype(np.float32)
    seen = Statistics(channels)
    found = smooth(model, {"layer/MatMul": seen, "other/MatMul": seen}, strength=0.5)
    assert found["layer/MatMul"] is found["other/MatMul"]
    (product,) = (node for node in model.graph if node.op_type == "Mul")
    assert product.inputs[1] is not None
    assert product.inputs[1].const_value is not None
    divisors = 1 / product.inputs[1].const_value.numpy()
    assert np.isfinite(divisors).all()
    others = channels > 0
    expected = np.sqrt(channels / np.abs(array).max(axis=1))[others]  # SmoothQuant, equation 4
    assert np.allclose(divisors[others] / divisors[0], expected / expected[0], rtol=1e-5)
    assert quantize(model, found, INT8) == 2


@pytest.mark.parametrize(("graph", "bound"), [("unet", 0.02), ("controlnet_scribble", 0.0088)])
def test_error_of_the_demo_model(graph: str, bound: float, tmp_path: Path) -> None:
    """The mean of three draws. Without smoothing the UNet's error would be 0.024.

    SparseCtrl's would be 0.010 without bias correction, and with signed inputs.
    """
    bundle = Bundle.load(demo_bundle())
    feeds, model = [random_inputs(bundle, graph, seed) for seed in range(3)], openvino._typed(bundle, graph, "fp32", {})
    observed = ObservedGraph(model, means=True)
    write_typed(model, tmp_path / "observed.onnx")
    exact = run_portable(tmp_path / "observed.onnx", *feeds)
    for outputs in exact:
        observed.see(outputs.pop(CHANNELS))
    seen = observed.statistics()
    seen = {layer: found for layer, found in seen.items() if not openvino.is_left_out(graph, layer, "bf16")}
    write_typed(openvino._typed(bundle, graph, "fp32", seen), tmp_path / "rounded.onnx")
    errors = []
    for actual, expected in zip(run_portable(tmp_path / "rounded.onnx", *feeds), exact, strict=True):
        relative = {name: np.square(actual[name] - of).mean() / np.square(of).mean() for name, of in expected.items()}
        errors.append(np.sqrt(max(relative.values())))
    assert 0.005 < np.mean(errors) < bound


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_convolutions_of_residual_blocks_take_a_silu(precision: str) -> None:
    """In both types: beside bf16 a cast stands between."""
    layers = quantizable(openvino._typed(Bundle.load(demo_bundle()), "controlnet_scribble", precision, {}))
    found = {str(node.name) for node in layers if is_silu(layer_input(node))}
    assert found == {str(node.name) for node in layers if re.search(r"resnets\.\d\.conv\d/", str(node.name))}


def test_beside_fp32_one_pixel_is_enough(tmp_path: Path) -> None:
    """OpenVINO 2026.4 compiles no reshape of a convolution whose image of channels innermost has a single pixel."""
    bundle = Bundle.load(demo_bundle())
    layers = quantizable(openvino._typed(bundle, "unet", "fp32", {}))
    seen = {str(node.name): Statistics(np.ones(weight_shape(node)[input_axis(node)], np.float32)) for node in layers}
    join_small_images(model := openvino._typed(bundle, "unet", "fp32", seen), 32)
    write_typed(model, tmp_path / "unet.onnx")
    feeds = random_inputs(bundle, "unet", size=ClipSize(width=32, height=32, frames=2))
    shapes = {name: array.shape for name, array in feeds.items()}
    options = compile_options("CPU", "int8", 1)
    (noise,) = OpenVinoSession(tmp_path / "unet.onnx", bundle.graph("unet"), shapes, "CPU", options).run(feeds)
    assert np.isfinite(noise).all()


STREAM = ("conv_shortcut", "downsamplers", "controlnet_down_blocks", "controlnet_mid_block")
FIRST = (r"^down_blocks\.0\.attentions\.0\.", r"^down_blocks\.0\.motion_modules\.0\.")
KEYS_OVER_TIME = r"motion_modules.*attn2\.to_[kv]"
UNET_BESIDE_BF16 = [
    *(*STREAM[:2], KEYS_OVER_TIME, r"^down_blocks\.[12]\.motion_modules.*proj_"),
    *(f"^down_blocks.0.*{name}" for name in ("proj_in/", "proj_out/", "to_out.0/", "ff.net.2/")),
]
SPARSECTRL_BESIDE_BF16 = [
    *(*STREAM, KEYS_OVER_TIME),
    *(
        f"{start}.*{name}"
        for start in (r"^down_blocks\.0\.attentions\.", r"\.motion_modules\.")
        for name in ("proj_in/", "proj_out/", "to_out.0/", "ff.net.2/")
    ),
]
BESIDE_FP32 = [
    r"^down_blocks\.[12]\.resnets\.0\.conv_shortcut",
    r"^up_blocks\.(1\.resnets\.1|2\.resnets\.[01])\.conv_shortcut",
    r"^down_blocks\.0\.downsamplers",
    "^controlnet_(down_blocks.0|mid_block)/",
    *(f"{start}proj_{side}/" for start in FIRST for side in ("in", "out")),
    KEYS_OVER_TIME,
]


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        ("bf16", {"unet": UNET_BESIDE_BF16, "controlnet_scribble": SPARSECTRL_BESIDE_BF16}),
        ("fp32", {"unet": BESIDE_FP32, "controlnet_scribble": BESIDE_FP32}),
    ],
)
def test_layers_that_are_left_out(
    precision: str, expected: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside fp32, where a product takes four times as long as in int8, they are fewer."""
    bundle, seen = Bundle.load(demo_bundle()), Statistics(np.ones(1, np.float32))
    graphs = {
        graph: [str(node.name) for node in quantizable(ir.load(bundle.folder / bundle.graph(graph).path))]
        for graph in ("unet", "controlnet_scribble")
    }
    everything = {graph: dict.fromkeys(layers, seen) for graph, layers in graphs.items()}
    monkeypatch.setattr(openvino, "observe_samples", lambda *_, **__: everything)
    monkeypatch.setattr(openvino, "OpenVinoSessions", lambda *_: None)
    kept = openvino.calibrate(bundle, tmp_path, precision)
    for graph, layers in graphs.items():
        kinds = expected[graph]
        for kind in kinds:
            assert any(re.search(kind, layer) for of in graphs.values() for layer in of), kind
        left = {layer for layer in layers if any(re.search(kind, layer) for kind in kinds)}
        assert set(kept[graph]) == set(layers) - left, graph
