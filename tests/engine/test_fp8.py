"""fp8 graphs: their numbers against torch's float8_e4m3fn, their kernels, and what does not go with fp8."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from sparsectrl_lcm.engine import check
from sparsectrl_lcm.engine.build import build
from sparsectrl_lcm.engine.quantization.number_formats import E4M3
from sparsectrl_lcm.engine.quantization.observer import ObservedGraph
from sparsectrl_lcm.engine.quantization.quantize_dequantize import InputRounding, quantize
from sparsectrl_lcm.engine.rewrites.precision import assign_types
from sparsectrl_lcm.engine.rewrites.typed_graph import write_typed
from sparsectrl_lcm.engine.tensorrt import builder, emulation
from sparsectrl_lcm.engine.tensorrt.fp8 import check_fp8
from sparsectrl_lcm.engine.tensorrt.kernels import kernels_of_log
from sparsectrl_lcm.runtime import BackendError, InvalidRequest
from sparsectrl_lcm.runtime.backends import BACKENDS
from sparsectrl_lcm.runtime.format.build_options import BuildOptions
from sparsectrl_lcm.runtime.format.bundle import Bundle, demo_bundle
from sparsectrl_lcm.runtime.format.clip_layout import ClipSize
from sparsectrl_lcm.runtime.gpu import device, tensorrt
from sparsectrl_lcm.runtime.gpu.device import Device
from sparsectrl_lcm.runtime.gpu.tensorrt_library import load_library

WIDTH, SIDE = 64, 8
LARGEST = {"block.conv/Conv": 4.0, "block.to_out/MatMul": 6.0}
HOPPER, AMPERE = (Device("a GPU", capability, 2**34, "580") for capability in ("9.0", "8.6"))


def rounded(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What is left of values after fp8, by torch."""
    return (values / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def scale_of(largest: torch.Tensor) -> torch.Tensor:
    return (largest / 448).half().float()


def toy(folder: Path) -> tuple[ir.Model, dict[str, np.ndarray]]:
    """A convolution, whose pixels go through a product, in fp32; and its weights."""
    generator = np.random.default_rng(0)
    shapes = {"block.conv.weight": (WIDTH, WIDTH, 3, 3), "block.to_out.weight": (WIDTH, WIDTH)}
    weights = {name: (generator.standard_normal(shape) / 8).astype(np.float32) for name, shape in shapes.items()}
    weights["block.conv.weight"][0] = 0  # a channel without a range
    names = list(weights)
    nodes = [
        helper.make_node("Conv", ["x", names[0]], ["a"], "block.conv/Conv", pads=[1, 1, 1, 1]),
        helper.make_node("Transpose", ["a"], ["b"], "turn", perm=[0, 2, 3, 1]),
        helper.make_node("MatMul", ["b", names[1]], ["y"], "block.to_out/MatMul"),
    ]
    ends = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, WIDTH, SIDE, SIDE]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, SIDE, SIDE, WIDTH]),
    ]
    held = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "toy", ends[:1], ends[1:], held)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=11), folder / "toy.onnx")
    return ir.load(folder / "toy.onnx"), weights


def rounding(largest: dict[str, float]) -> dict[str, InputRounding]:
    return {layer: InputRounding(magnitude) for layer, magnitude in largest.items()}


def fp8_toy(folder: Path) -> tuple[ir.Model, dict[str, np.ndarray], Path]:
    """The toy in fp16, with both layers in fp8; its weights; its file."""
    model, weights = toy(folder)
    assign_types(model, "fp16")
    assert quantize(model, rounding(LARGEST), E4M3) == 2
    write_typed(model, folder / "fp8.onnx")
    return model, weights, folder / "fp8.onnx"


def by_torch(weights: dict[str, np.ndarray], x: np.ndarray) -> torch.Tensor:
    """The toy's result, with inputs and weights of both layers rounded to fp8 and all results to fp16."""
    conv, out = (torch.from_numpy(array).half().float() for array in weights.values())
    limits = [torch.tensor(largest) for largest in LARGEST.values()]
    conv = rounded(conv, scale_of(conv.abs().max())).half().float()
    out = rounded(out, scale_of(out.abs().max())).half().float()
    image = rounded(torch.from_numpy(x).half().float(), scale_of(limits[0])).half().float()
    image = torch.nn.functional.conv2d(image, conv, padding=1).half().float().permute(0, 2, 3, 1)
    return rounded(image, scale_of(limits[1])).half().float() @ out


def inputs() -> np.ndarray:
    """Values of which some exceed the range, and are limited to it."""
    return np.random.default_rng(1).standard_normal((1, WIDTH, SIDE, SIDE)).astype(np.float32) * 2


def test_numbers_are_rounded_as_torch_rounds_them() -> None:
    values = np.concatenate([np.linspace(-600, 600, 3001), np.logspace(-12, 9, 500, base=2)]).astype(np.float32)
    expected = torch.from_numpy(values).clamp(-448, 448).to(torch.float8_e4m3fn).float().numpy()
    assert (E4M3.round(values).astype(np.float32) == expected).all()


def test_weights_in_the_file_have_one_byte_each(tmp_path: Path) -> None:
    _, weights, path = fp8_toy(tmp_path)
    held = {item.name: item for item in onnx.load(path).graph.initializer}
    for name, weight in weights.items():
        tensor = held[f"{name}.fp8"]
        assert (tensor.data_type, len(tensor.raw_data)) == (TensorProto.FLOAT8E4M3FN, weight.size)
        assert held[f"{name}.fp8.scale"].data_type == TensorProto.FLOAT16
        assert name not in held


def test_layers_with_the_same_input_have_one_scale_of_weights(tmp_path: Path) -> None:
    """TensorRT then joins them to one product without a further kernel for their scales."""
    model, weights = toy(tmp_path)
    (product,) = (node for node in model.graph if node.op_type == "MatMul")
    larger = weights["block.to_out.weight"] * 4
    held = ir.Value(name="larger", const_value=ir.tensor(larger, name="larger"), shape=ir.Shape(larger.shape))
    model.graph.register_initializer(held)
    model.graph.append(ir.node("MatMul", [product.inputs[0], held], name="block.to_k/MatMul"))
    largest = {**LARGEST, "block.to_k/MatMul": LARGEST["block.to_out/MatMul"]}
    assert quantize(model, rounding(largest), E4M3) == 3
    write_typed(model, tmp_path / "fp8.onnx")
    found = {item.name: numpy_helper.to_array(item) for item in onnx.load(tmp_path / "fp8.onnx").graph.initializer}
    scales = [found[f"{name}.fp8.scale"] for name in ("block.to_out.weight", "larger")]
    assert scales == [np.abs(larger).max() / np.float32(448)] * 2
    assert found["block.conv.weight.fp8.scale"] == np.abs(weights["block.conv.weight"]).max() / np.float32(448)


def test_the_check_of_a_build_computes_in_fp8(tmp_path: Path) -> None:
    """The check's graph gives torch's result to within fp16's rounding, which is far from that in fp32."""
    model, weights, path = fp8_toy(tmp_path)
    model = ir.load(path)
    check.round_results(model)
    ir.save(model, tmp_path / "rounded.onnx")
    x = inputs()
    actual = check.open_portable(tmp_path / "rounded.onnx").run(None, {"x": x.astype(np.float16).astype(np.float32)})[0]
    exact = onnxruntime.InferenceSession(tmp_path / "toy.onnx").run(None, {"x": x})[0]
    expected = by_torch(weights, x).numpy()
    assert np.median(np.abs(actual - expected)) <= 1e-3 * np.abs(expected).max()
    assert np.abs(actual - expected).mean() < 0.1 * np.abs(exact - expected).mean()


def test_observed_statistics_are_those_of_the_inputs(tmp_path: Path) -> None:
    model, _ = toy(tmp_path)
    observed = ObservedGraph(model)
    ir.save(model, tmp_path / "observed.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "observed.onnx")
    runs = [inputs(), 3 * inputs()]
    for x in runs:
        _, channels = session.run(None, {"x": x})
        observed.see(channels)
    found = observed.statistics()["block.conv/Conv"]
    assert (found.channels == np.abs(runs[1]).max((0, 2, 3))).all()
    assert found.largest == np.abs(runs[1]).max()


def test_a_graph_without_layers_has_no_statistics(tmp_path: Path) -> None:
    model, _ = toy(tmp_path)
    for node in model.graph:
        node.name = f"time_embedding.{node.name}"
    observed = ObservedGraph(model)
    ir.save(model, tmp_path / "observed.onnx")
    _, channels = onnxruntime.InferenceSession(tmp_path / "observed.onnx").run(None, {"x": inputs()})
    observed.see(channels)
    assert observed.statistics() == {}


def test_tensorrt_rtx_compiles_fp8_kernels(tmp_path: Path) -> None:
    _, _, path = fp8_toy(tmp_path)
    library = load_library("tensorrt-rtx")
    trt, logger = library.module, library.logger
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(path))
    config = builder.create_builder_config()
    config.builder_optimization_level = 0
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    logger.layers = ""
    assert builder.build_serialized_network(network, config) is not None
    kernels = kernels_of_log(logger.layers)
    for layer in LARGEST:
        (kernel,) = (one for one in kernels if layer in one.nodes and one.kind in ("gemm", "correlation"))
        assert [tensor.format for tensor in kernel.inputs] == ["FP8"], layer
        assert [tensor.bytes for tensor in kernel.inputs] == [WIDTH * SIDE * SIDE]
    assert not [kernel.name for kernel in kernels if any(tensor.is_fp32 for tensor in kernel.outputs)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"refit": True}, "refit: not with fp8"),
        ({"strip_weights": True}, "strip_weights: not with fp8"),
        ({"hardware_compatibility": "ampere-plus"}, "Ampere does not compute in fp8"),
        ({"compute_capabilities": ("8.9", "8.6")}, "8.6 does not compute in fp8; give 8.9 or above"),
    ],
)
def test_what_does_not_go_with_fp8_is_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        check_fp8(BuildOptions(precision="fp8", **options), None)  # type: ignore[arg-type]
    assert said in str(error.value)
    assert len(str(error.value)) < 200


def test_older_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_fp8(BuildOptions(precision="fp8"), HOPPER)
    check_fp8(BuildOptions(precision="fp8", compute_capabilities=("12.0",)), AMPERE)
    with pytest.raises(BackendError, match=r"a GPU \(compute capability 8.6\) does not compute in fp8"):
        check_fp8(BuildOptions(precision="fp8"), AMPERE)
    for gpu, order in ((HOPPER, ("fp16", "bf16", "fp32", "fp8")), (AMPERE, ("fp16", "bf16", "fp32"))):
        monkeypatch.setattr(device, "probe", lambda gpu=gpu: gpu)
        assert BACKENDS["tensorrt"].order() == order


def test_older_gpus_load_no_fp8_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = tensorrt.TensorRtLoader(SimpleNamespace(backend="tensorrt"), AMPERE)  # type: ignore[arg-type]
    engines = SimpleNamespace(index=SimpleNamespace(precision="fp8", engines={}))
    monkeypatch.setattr(loader, "_set", lambda *_: engines)
    with pytest.raises(BackendError, match="does not compute in fp8; build and load fp16 engines"):
        loader.open(None, "unet", None, {}, None)  # type: ignore[arg-type]


def test_group_norms_take_fp16_in_graphs_with_fp8_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranges = {"vae_decoder": {"decoder.mid_block.resnets.0.conv1/Conv_24": 1.0}}
    monkeypatch.setattr(emulation, "calibrate", lambda *_: ranges)
    emulated = emulation.emulated_graphs(Bundle.load(), "fp8")
    options = BuildOptions(64, 64, 1, precision="fp8")
    job = builder._Build(
        Bundle.load(), ClipSize(width=64, height=64, frames=1), options, load_library("tensorrt-rtx"), None
    )
    job.ranges = ranges
    for graph, expected in (("vae_decoder", ir.DataType.FLOAT16), ("vae_encoder", ir.DataType.FLOAT)):
        job.write_source(graph, tmp_path / "built.onnx")
        for model in (emulated(graph), ir.load(tmp_path / "built.onnx")):
            norms = [node for node in model.graph if node.op_type == "GroupNormalization"]
            norms = [node for node in norms if "group_norm/" not in (node.name or "")]
            assert norms
            assert {value.const_value.dtype for node in norms for value in node.inputs[1:]} == {expected}


@pytest.mark.slow
def test_a_decoder_is_built_in_fp8(tmp_path: Path) -> None:
    """Calibrated on real requests; the build compares it with fp32."""
    bundle = Path(shutil.copytree(demo_bundle(), tmp_path / "bundle"))
    options = BuildOptions(64, 64, 1, precision="fp8", graphs=("vae_decoder",), optimization_level=0, keep_source=True)
    built = build(bundle, "tensorrt-rtx", options)
    record = built.index.engines["vae_decoder"]
    assert 0 < max(record.report["errors"].values()) <= 8
    (path,) = (bundle / "engines").rglob("vae_decoder.onnx")
    source = onnx.load(path, load_external_data=False)
    types = [item.data_type for item in source.graph.initializer if item.name.endswith(".weight.fp8")]
    assert types
    assert set(types) == {TensorProto.FLOAT8E4M3FN}
