"""Convolutions of small images laid together: the same results at every size, and no trace of it for large images."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import openvino
import pytest
from sparsectrl_lcm.engine.quantization.number_formats import INT8
from sparsectrl_lcm.engine.quantization.quantize_dequantize import InputRounding, quantize
from sparsectrl_lcm.engine.rewrites.small_images import join_small_images

CHANNELS, OUT, MOST_PIXELS = 32, 40, 32
SHAPES = [(6, 2, 2), (3, 1, 1), (1, 3, 5), (4, 5, 4), (5, 7, 1), (2, 4, 8), (2, 8, 8), (2, 9, 16)]
"""Numbers of images, heights and widths: odd and even ones, and the last two too large to be laid together."""
KINDS = {
    "3x3": (3, 1, (1, 1, 1, 1)),
    "stride 2": (3, 2, (1, 1, 1, 1)),
    "1x1": (1, 1, (0, 0, 0, 0)),
    "upper left 2x2": (2, 1, (1, 1, 0, 0)),
    "lower left 2x2": (2, 1, (0, 1, 1, 0)),
    "lower right 2x2": (2, 1, (0, 0, 1, 1)),
}
"""The side of the kernel, the stride and the padding of the convolutions of a UNet with folded upsampling."""


def convolutions(*kinds: tuple[int, int, tuple[int, ...]]) -> ir.Model:
    """A graph of convolutions of the same images, each with a result of its own."""
    random, nodes, constants = np.random.default_rng(1), [], []
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([None, CHANNELS, None, None]))
    for index, (side, stride, pads) in enumerate(kinds):
        arrays = (
            random.standard_normal((OUT, CHANNELS, side, side), np.float32),
            random.standard_normal(OUT, np.float32),
        )
        values = [
            ir.Value(name=f"{name}{index}", const_value=ir.tensor(array, name=f"{name}{index}"))
            for name, array in zip(("weight", "bias"), arrays, strict=True)
        ]
        node = ir.node("Conv", [x, *values], {"pads": pads, "strides": [stride] * 2}, name=f"layer{index}/Conv")
        node.outputs[0].name, node.outputs[0].type = f"y{index}", ir.TensorType(ir.DataType.FLOAT)
        nodes.append(node)
        constants += values
    outputs = [node.outputs[0] for node in nodes]
    return ir.Model(ir.Graph([x], outputs, nodes=nodes, initializers=constants, opset_imports={"": 21}), ir_version=10)


def session(model: ir.Model, path: Path) -> onnxruntime.InferenceSession:
    ir.save(model, path)
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def assert_equal(plain: ir.Model, joined: ir.Model, folder: Path) -> None:
    """Compares two graphs at every size."""
    sessions = [session(model, folder / f"{index}.onnx") for index, model in enumerate((plain, joined))]
    assert [item.name for item in sessions[0].get_outputs()] == [item.name for item in sessions[1].get_outputs()]
    for count, height, width in SHAPES:
        x = np.random.default_rng(2).standard_normal((count, CHANNELS, height, width), np.float32)
        for expected, actual in zip(*(each.run(None, {"x": x}) for each in sessions), strict=True):
            assert actual.shape == expected.shape
            assert np.abs(actual - expected).max() < 1e-4


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_kind_gives_the_same(kind: tuple[int, int, tuple[int, ...]], tmp_path: Path) -> None:
    joined = convolutions(kind)
    assert join_small_images(joined, MOST_PIXELS) == 1
    assert_equal(convolutions(kind), joined, tmp_path)


def test_convolutions_with_the_same_rounded_input_share_its_images(tmp_path: Path) -> None:
    """As the four of an upsampling do. The images are laid together once, before they are rounded."""
    models = [convolutions(*(kind for name, kind in KINDS.items() if "2x2" in name)) for _ in range(2)]
    for model in models:
        assert quantize(model, {f"layer{index}/Conv": InputRounding(4.0) for index in range(3)}, INT8) == 3
    assert join_small_images(models[1], MOST_PIXELS) == 3
    (down,) = (node for node in models[1].graph if node.op_type == "QuantizeLinear")
    assert down.inputs[0] is not None
    assert down.inputs[0].name != "x"
    assert_equal(*models, tmp_path)


def test_what_others_take_too_is_left() -> None:
    """A 3x3 and a 1x1 convolution of one rounded input want it laid out differently."""
    model = convolutions(KINDS["3x3"], KINDS["1x1"])
    assert quantize(model, {f"layer{index}/Conv": InputRounding(4.0) for index in range(2)}, INT8) == 2
    assert join_small_images(model, MOST_PIXELS) == 0


@pytest.mark.parametrize(
    "kind",
    [(3, 1, (0, 0, 0, 0)), (3, 3, (1, 1, 1, 1)), (5, 1, (2, 2, 2, 2)), (1, 2, (0, 0, 0, 0))],
    ids=["no padding", "stride 3", "5x5", "1x1 with stride 2"],
)
def test_other_convolutions_are_left(kind: tuple[int, int, tuple[int, ...]]) -> None:
    assert join_small_images(convolutions(kind), MOST_PIXELS) == 0


def operators(path: Path, side: int) -> list[str]:
    """What OpenVINO runs for two images of this height and width."""
    model = openvino.Core().read_model(path)
    model.reshape([2, CHANNELS, side, side])
    nodes = openvino.Core().compile_model(model, "CPU").get_runtime_model().get_ordered_ops()
    return sorted(node.get_rt_info()["layerType"].astype(str) for node in nodes)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_openvino_drops_it_for_large_images(kind: tuple[int, int, tuple[int, ...]], tmp_path: Path) -> None:
    """Sides of 16 are those of the second level in clips of 256x256."""
    join_small_images(joined := convolutions(kind), MOST_PIXELS)
    for name, model in (("plain", convolutions(kind)), ("joined", joined)):
        ir.save(model, tmp_path / f"{name}.onnx")
    plain = operators(tmp_path / "plain.onnx", 16)
    assert operators(tmp_path / "joined.onnx", 16) == plain
    assert len(operators(tmp_path / "joined.onnx", 4)) > len(plain)
