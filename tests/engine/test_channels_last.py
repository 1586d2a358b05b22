"""Group norms by channels and motion modules with channels last, compared with the original graphs and float64."""

import re
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import openvino
import pytest
from conftest import export_architecture
from onnx import helper
from sparsectrl_lcm.engine.check import random_inputs, run_portable
from sparsectrl_lcm.engine.rewrites.channels_last import norm_by_channels, turn_motion_modules
from sparsectrl_lcm.engine.rewrites.precision import is_residual_stream
from sparsectrl_lcm.engine.rewrites.typed_graph import typed_graph
from sparsectrl_lcm.runtime.format.bundle import Bundle, demo_bundle
from sparsectrl_lcm.runtime.format.manifest import resolve_shape
from test_exact_simplifications import assert_equal_results, operators, random, rewritten, write_graph

CHANNELS, OF_A_GROUP, EPSILON = 12, 3, 1e-5
HALF_A_STEP_OF_BF16 = 2.0**-9
OF_IMAGES = re.compile(r"(resnets\.\d+\.norm[12]|attentions\.\d+\.norm|conv_norm_out)\.weight$")
"""Weights of the group norms of images. The norms in `transformer_blocks` are layer norms."""
MOTION_MODULE = re.compile(r"motion_modules\.\d+/")
"""Nodes that belong to a motion module itself, not to its norm or its transformer."""


def group_norm(path: Path, rank: int = 4, channels: int = CHANNELS, convolved: bool = False) -> Path:
    """Writes a group norm of [N, C, ...] as the export does, alone or after an identity convolution."""
    groups = channels // OF_A_GROUP
    weights = {
        "norm.weight": random(channels, seed=1),
        "norm.bias": random(channels, seed=2),
        "groups": np.array([groups]),
        "rest": np.array([-1]),
        "ones": np.ones(groups, np.float32),
        "zeros": np.zeros(groups, np.float32),
        "affine": np.array([-1, *(1,) * (rank - 2)]),
    }
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Shape", ["x"], ["images"], end=1),
        helper.make_node("Concat", ["images", "groups", "rest"], ["split"], axis=0),
        helper.make_node("Reshape", ["x", "split"], ["grouped"], name="norm/Reshape_1"),
        helper.make_node(
            "InstanceNormalization", ["grouped", "ones", "zeros"], ["instances"], name="norm/Instance", epsilon=EPSILON
        ),
        helper.make_node("Reshape", ["instances", "shape"], ["normalized"], name="norm/Reshape_2"),
        helper.make_node("Reshape", ["norm.weight", "affine"], ["weight"], name="norm/Reshape_3"),
        helper.make_node("Mul", ["normalized", "weight"], ["scaled"], name="norm/Mul_1"),
        helper.make_node("Reshape", ["norm.bias", "affine"], ["bias"], name="norm/Reshape_4"),
        helper.make_node("Add", ["scaled", "bias"], ["shifted"], name="norm/Add_1"),
        helper.make_node("Neg", ["shifted"], ["y"]),
    ]
    if convolved:
        weights["kernel"] = np.zeros((channels, channels, 3, 3), np.float32)
        weights["kernel"][:, :, 1, 1] = np.eye(channels)
        for node in nodes:
            node.input[:] = ["images.convolved" if name == "x" else name for name in node.input]
        nodes.insert(0, helper.make_node("Conv", ["x", "kernel"], ["images.convolved"], pads=[1, 1, 1, 1]))
    return write_graph(path, nodes, weights, rank=rank)


def expected_norm(images: np.ndarray) -> np.ndarray:
    """Computes the expected output of `group_norm` in float64."""
    count, channels, *_ = images.shape
    grouped = images.astype(np.float64).reshape(count, channels // OF_A_GROUP, -1)
    centred = grouped - grouped.mean(-1, keepdims=True)
    normalized = (centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPSILON)).reshape(images.shape)
    weight, bias = (random(channels, seed=seed)[:, None, None] for seed in (1, 2))
    return -(normalized * weight + bias)


def normed(folder: Path, images: np.ndarray) -> np.ndarray:
    """Runs the rewritten norm."""
    result, counts = rewritten(group_norm(folder / "g.onnx"), folder, norm_by_channels)
    assert counts == [1]
    assert "InstanceNormalization" not in operators(result)
    (outputs,) = run_portable(result, {"x": images})
    return outputs["y"]


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (32, 32)])
def test_a_norm_by_channels_gives_the_same(shape: tuple[int, int], tmp_path: Path) -> None:
    """Each channel has its own mean and deviation, so that statistics of a group differ from those of its channels."""
    channel = np.arange(CHANNELS)[:, None, None]
    images = (random(3, CHANNELS, *shape) * (1 + channel % 5) + channel).astype(np.float32)
    expected = expected_norm(images)
    np.testing.assert_allclose(normed(tmp_path, images), expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("side", [64, 256])
@pytest.mark.parametrize("mean", [0, 3, 10])
def test_openvino_keeps_to_a_twentieth_of_what_bf16_rounds(mean: float, side: int, tmp_path: Path) -> None:
    """Channels are innermost, as after a convolution: OpenVINO then sums the pixels one after the other."""
    channels = 96  # with fewer, OpenVINO leaves them outermost
    images = random(1, channels, side, side) + np.float32(mean)
    expected = expected_norm(images)
    norm = group_norm(tmp_path / "g.onnx", channels=channels, convolved=True)
    path, counts = rewritten(norm, tmp_path, norm_by_channels)
    assert counts == [1]
    core = openvino.Core()
    model = core.read_model(path)
    model.reshape({"x": list(images.shape)})
    actual = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})({"x": images})[0]
    assert np.abs(actual - expected).max() < HALF_A_STEP_OF_BF16 / 20 * np.abs(expected).max()


def test_images_of_one_value_stay_finite(tmp_path: Path) -> None:
    """Without a clamp, rounding makes the variance negative for about half of these values."""
    values = np.linspace(1, 300, 150, dtype=np.float32)
    images = np.broadcast_to(values[:, None, None, None], (len(values), CHANNELS, 31, 33))
    np.testing.assert_allclose(normed(tmp_path, images), expected_norm(images), rtol=0, atol=0.1)


def test_norms_of_other_ranks_are_left(tmp_path: Path) -> None:
    path = group_norm(tmp_path / "g.onnx", rank=3)
    left, counts = rewritten(path, tmp_path, norm_by_channels)
    assert counts == [0]
    assert operators(left) == operators(path)


def feeds_of(bundle: Bundle, graph: str) -> dict[str, np.ndarray]:
    """Draws random inputs with two prompts, three frames and non-square images."""
    sizes = {
        "batch": 2,
        "frames": 3,
        "images": 3,
        "distinct_frames": 4,
        "tokens": 9,
        "latent_height": 8,
        "latent_width": 16,
    }
    feeds = random_inputs(bundle, graph)
    for item in bundle.graph(graph).inputs:
        if item.dtype == "float32" and len(item.shape) > 1:
            feeds[item.name] = random(*resolve_shape(item.shape, sizes))
    if "frame_index" in feeds:
        feeds["frame_index"] = feeds["frame_index"][: sizes["frames"]]
    return feeds


@pytest.fixture(params=["sd15_like", pytest.param("other", marks=pytest.mark.slow), "demo"])
def bundle(request: pytest.FixtureRequest) -> Bundle:
    """Bundles whose temporal norm takes statistics over the clip, and the demo bundle with statistics per frame."""
    if request.param == "demo":
        return Bundle.load(demo_bundle())
    return Bundle.load(export_architecture(request.param).bundle)


@pytest.mark.parametrize("graph", ["unet", "controlnet_rgb", "vae_encoder", "vae_decoder"])
def test_every_norm_and_motion_module_of_a_real_graph_is_found(bundle: Bundle, graph: str, tmp_path: Path) -> None:
    """Finds as many norms as have weights, except in the VAE's attention, where channels are innermost already."""
    path = bundle.folder / bundle.graph(graph).path
    portable = onnx.load(path, load_external_data=False)
    norms = [item.name for item in portable.graph.initializer if re.search(r"norm\w*\.weight$", item.name)]
    modules = [name for name in norms if re.search(r"motion_modules\.\d+\.norm\.weight$", name)]
    images = [name for name in norms if OF_IMAGES.search(name)]
    assert images
    assert bool(modules) == (not graph.startswith("vae_"))

    result, counts = rewritten(path, tmp_path, turn_motion_modules, norm_by_channels)
    assert counts == [len(modules), len(images)]
    assert operators(result).count("InstanceNormalization") == graph.startswith("vae_")
    assert operators(result).count("ReduceL2") == len(modules) + len(images)
    assert_equal_results(path, result, feeds_of(bundle, graph))


def test_norms_by_channels_stay_in_fp32(bundle: Bundle) -> None:
    """The rest of the graph is bf16, including the transposes of frames, which then move half of the bytes."""

    def rewrite(model: ir.Model) -> None:
        turn_motion_modules(model)
        norm_by_channels(model)

    model = typed_graph(bundle, "unet", "bf16", rewrite, is_residual_stream)
    low = {value for value in model.graph.initializers.values() if value.dtype == ir.DataType.BFLOAT16}
    turned = 0
    for node in model.graph:  # in topological order; only casts change the type
        if node.op_type == "Shape":
            continue
        if node.op_type == "Cast":
            is_low = ir.DataType(node.attributes["to"].as_int()) == ir.DataType.BFLOAT16
        else:
            is_low = any(value in low for value in node.inputs)
        if is_low:
            low.update(node.outputs)
            assert ".channels." not in (node.name or ""), node.name
            turned += ".turned." in (node.name or "")
    modules = sum(".motion_modules." in name and name.endswith(".norm.weight") for name in model.graph.initializers)
    assert turned == 6 * modules


def test_frames_enter_and_leave_a_motion_module_with_channels_innermost(bundle: Bundle, tmp_path: Path) -> None:
    """All transposes between images and rows keep the channels of a pixel together."""
    path = bundle.folder / bundle.graph("unet").path
    result, (modules,) = rewritten(path, tmp_path, turn_motion_modules)
    perms = [
        list(node.attribute[0].ints)
        for node in onnx.load(result, load_external_data=False).graph.node
        if node.op_type == "Transpose" and MOTION_MODULE.search(node.name)
    ]
    assert sorted(perms) == sorted([[0, 2, 3, 1], [0, 2, 1, 3], [0, 2, 1, 3], [0, 3, 1, 2]] * modules)
