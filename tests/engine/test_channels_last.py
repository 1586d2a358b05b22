"""Group norms by channels and turned motion modules, against the graphs as they were on ONNX Runtime."""

import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import Exported
from onnx import helper
from sparsectrl_lcm.engine.channels_last import norm_by_channels, turn_motion_modules
from sparsectrl_lcm.engine.check import random_inputs, run_portable
from sparsectrl_lcm.runtime.bundle import Bundle, demo_bundle
from sparsectrl_lcm.runtime.manifest import resolve_shape
from test_identities import assert_equal_results, operators, random, rewritten, write_graph

CHANNELS, GROUPS, EPSILON = 12, 4, 1e-5
HALF_A_STEP_OF_BF16 = 2.0**-9
OF_IMAGES = re.compile(r"(resnets\.\d+\.norm[12]|attentions\.\d+\.norm|conv_norm_out)\.weight$")
"""The weights of group norms of images; `transformer_blocks` have layer norms."""
MOTION_MODULE = re.compile(r"motion_modules\.\d+(\.norm)?/")
"""Nodes of a motion module, without its transformer."""


def group_norm(path: Path, rank: int = 4) -> Path:
    """A group norm of [N, C, ...] as it is exported."""
    weights = {
        "norm.weight": random(CHANNELS, seed=1),
        "norm.bias": random(CHANNELS, seed=2),
        "groups": np.array([GROUPS]),
        "rest": np.array([-1]),
        "ones": np.ones(GROUPS, np.float32),
        "zeros": np.zeros(GROUPS, np.float32),
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
    return write_graph(path, nodes, weights, rank=rank)


def expected_norm(images: np.ndarray) -> np.ndarray:
    """What `group_norm` is to give, in float64."""
    grouped = images.astype(np.float64).reshape(len(images), GROUPS, -1)
    centred = grouped - grouped.mean(-1, keepdims=True)
    normalized = (centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPSILON)).reshape(images.shape)
    weight, bias = (random(CHANNELS, seed=seed)[:, None, None] for seed in (1, 2))
    return -(normalized * weight + bias)


def normed(folder: Path, images: np.ndarray) -> np.ndarray:
    """What the rewritten norm gives."""
    result, counts = rewritten(group_norm(folder / "g.onnx"), folder, norm_by_channels)
    assert counts == [1]
    assert "InstanceNormalization" not in operators(result)
    (outputs,) = run_portable(result, {"x": images})
    return outputs["y"]


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (32, 32)])
def test_a_norm_by_channels_gives_the_same(shape: tuple[int, int], tmp_path: Path) -> None:
    """Each channel with a mean and a deviation of its own, so that groups are not what their channels are."""
    channel = np.arange(CHANNELS)[:, None, None]
    images = (random(3, CHANNELS, *shape) * (1 + channel % 5) + channel).astype(np.float32)
    expected = expected_norm(images)
    np.testing.assert_allclose(normed(tmp_path, images), expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_a_mean_of_ten_deviations_costs_a_tenth_of_what_bf16_rounds(tmp_path: Path) -> None:
    images = random(2, CHANNELS, 64, 64) + 10
    expected = expected_norm(images)
    error = np.abs(normed(tmp_path, images) - expected).max()
    assert error < HALF_A_STEP_OF_BF16 / 10 * np.abs(expected).max()


def test_images_of_one_value_stay_finite(tmp_path: Path) -> None:
    """Whose variance may come out below zero."""
    images = np.full((2, CHANNELS, 31, 33), 1.2345, np.float32)
    np.testing.assert_allclose(normed(tmp_path, images), expected_norm(images), rtol=0, atol=1e-3)


def test_norms_of_other_ranks_are_left(tmp_path: Path) -> None:
    path = group_norm(tmp_path / "g.onnx", rank=3)
    left, counts = rewritten(path, tmp_path, norm_by_channels)
    assert counts == [0]
    assert operators(left) == operators(path)


def feeds_of(bundle: Bundle, graph: str) -> dict[str, np.ndarray]:
    """Random inputs with two prompts, three frames, and images that are not square."""
    sizes = {"batch": 2, "frames": 3, "images": 3, "distinct_frames": 4, "latent_height": 8, "latent_width": 16}
    feeds = random_inputs(bundle, graph)
    for item in bundle.graph(graph).inputs:
        if item.dtype == "float32" and len(item.shape) > 1:
            feeds[item.name] = random(*resolve_shape(item.shape, sizes))
    if "frame_index" in feeds:
        feeds["frame_index"] = feeds["frame_index"][: sizes["frames"]]
    return feeds


@pytest.fixture(params=["clip", "frame"])
def bundle(request: pytest.FixtureRequest) -> Bundle:
    """Statistics of the temporal norm over the clip, or of each frame, as the demo model takes them."""
    if request.param == "frame":
        return Bundle.load(demo_bundle())
    exported: Exported = request.getfixturevalue("sd15_like")
    return Bundle.load(exported.bundle)


@pytest.mark.parametrize("graph", ["unet", "controlnet_rgb", "vae_decoder"])
def test_every_norm_and_motion_module_of_a_real_graph_is_found(bundle: Bundle, graph: str, tmp_path: Path) -> None:
    """As many as have weights; the attention of the VAE norms positions, which hold channels innermost already."""
    path = bundle.folder / bundle.graph(graph).path
    portable = onnx.load(path, load_external_data=False)
    norms = [item.name for item in portable.graph.initializer if re.search(r"norm\w*\.weight$", item.name)]
    modules = [name for name in norms if re.search(r"motion_modules\.\d+\.norm\.weight$", name)]
    images = [name for name in norms if OF_IMAGES.search(name)]
    assert images
    assert bool(modules) == (graph != "vae_decoder")

    result, counts = rewritten(path, tmp_path, turn_motion_modules, norm_by_channels)
    assert counts == [len(modules), len(images)]
    assert operators(result).count("InstanceNormalization") == (graph == "vae_decoder")
    assert operators(result).count("ReduceL2") == len(modules) + len(images)
    assert_equal_results(path, result, feeds_of(bundle, graph))


def test_frames_enter_and_leave_a_motion_module_with_channels_innermost(bundle: Bundle, tmp_path: Path) -> None:
    """Between images and rows channels are never apart from their pixel."""
    path = bundle.folder / bundle.graph("unet").path
    result, (modules,) = rewritten(path, tmp_path, turn_motion_modules)
    perms = [
        list(node.attribute[0].ints)
        for node in onnx.load(result, load_external_data=False).graph.node
        if node.op_type == "Transpose" and MOTION_MODULE.search(node.name)
    ]
    assert sorted(perms) == sorted([[0, 2, 3, 1], [0, 2, 1, 3], [0, 2, 1, 3], [0, 3, 1, 2]] * modules)
