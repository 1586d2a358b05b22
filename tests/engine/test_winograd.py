"""Winograd convolutions, compared with plain ones on ONNX Runtime."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Exported
from flops import count_flops
from onnx import helper
from sparsectrl_lcm.engine.check import random_inputs, run_portable
from sparsectrl_lcm.engine.rewrites import winograd
from sparsectrl_lcm.engine.rewrites.winograd import filter_convolutions
from sparsectrl_lcm.runtime.format.bundle import Bundle
from test_exact_simplifications import (
    CONVOLUTION,
    CUTS,
    operators,
    random,
    rewritten,
    skip_feeds,
    upsampler,
    weight_shapes,
    write_graph,
)

INPUTS, OUTPUTS = 32, 48
MIN_CHANNELS = 32


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lowers the minimum number of channels to that of these graphs."""
    monkeypatch.setattr(winograd, "MIN_CHANNELS", MIN_CHANNELS)


def convolution(path: Path, outputs: int = OUTPUTS, inputs: int = INPUTS, bias: bool = True, **changed: Any) -> Path:
    """Writes a 3x3 convolution with some attributes changed."""
    attributes = CONVOLUTION | changed
    weights = {"weight": random(outputs, inputs // attributes["group"], *attributes["kernel_shape"])}
    if bias:
        weights["bias"] = random(outputs)
    return write_graph(path, [helper.make_node("Conv", ["x", *weights], ["y"], name="c", **attributes)], weights)


def assert_close(path: Path, result: Path, feeds: dict[str, np.ndarray]) -> None:
    """Checks that results agree within 2e-5 of the largest value."""
    ((expected,), (actual,)) = (run_portable(each, feeds) for each in (path, result))
    assert actual["y"].shape == expected["y"].shape
    np.testing.assert_allclose(actual["y"], expected["y"], rtol=0, atol=2e-5 * np.abs(expected["y"]).max())


def graph(folder: Path, doubled: bool, **options: Any) -> Path:
    """Writes a convolution, after a doubling if `doubled`; options are those of `upsampler` or `convolution`."""
    if doubled:
        return upsampler(folder / "g.onnx", weight=random(OUTPUTS, INPUTS, 3, 3), **options)
    return convolution(folder / "g.onnx", **options)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (4, 8), (5, 7)])
@pytest.mark.parametrize("doubled", [False, True])
def test_results_are_the_same_up_to_the_border(
    doubled: bool, shape: tuple[int, int], bias: bool, tmp_path: Path
) -> None:
    path = graph(tmp_path, doubled, bias=bias)
    result, counts = rewritten(path, tmp_path, filter_convolutions)
    assert counts == [1]
    assert not {"Conv", "Resize"} & set(operators(result))
    assert_close(path, result, {"x": random(3, INPUTS, *shape, seed=1)})


@pytest.mark.parametrize(("shape", "size"), CUTS)
def test_results_after_a_cut_are_the_same_up_to_the_border(
    shape: tuple[int, int], size: tuple[int, int], tmp_path: Path
) -> None:
    path = graph(tmp_path, doubled=True, cut=True)
    result, counts = rewritten(path, tmp_path, filter_convolutions)
    assert counts == [1]
    assert_close(path, result, skip_feeds(INPUTS, shape, size))


@pytest.mark.parametrize("doubled", [False, True])
def test_large_kernels_take_small_tiles(doubled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles take 9 products after a doubling, else 16, for four results."""
    monkeypatch.setattr(winograd, "LARGE", INPUTS * OUTPUTS - 1)
    path = graph(tmp_path, doubled)
    result, counts = rewritten(path, tmp_path, filter_convolutions)
    assert counts == [1]
    assert operators(result).count("MatMul") == (9 if doubled else 16) + 2
    assert_close(path, result, {"x": random(3, INPUTS, 5, 7, seed=1)})


@pytest.mark.parametrize(("doubled", "products"), [(False, 36), (True, 25)])
def test_products_over_channels_are_a_quarter_and_less(doubled: bool, products: int, tmp_path: Path) -> None:
    """Takes 36 or 25 products for 16 results; the matrices of the transforms have as many rows."""
    path = graph(tmp_path, doubled)
    result, _ = rewritten(path, tmp_path, filter_convolutions)
    size, pixels = (8, 4 * 4) if doubled else (16, 6 * 6)
    tiles = 2 * 4 * 4
    transforms = products * pixels * INPUTS + 16 * products * OUTPUTS
    expected = 2 * tiles * (products * INPUTS * OUTPUTS + transforms)
    feeds = {"x": random(2, INPUTS, size, size, seed=1)}
    assert count_flops(result, feeds, tmp_path) == expected
    assert count_flops(path, feeds, tmp_path) == 2 * tiles * 144 * INPUTS * OUTPUTS


UNLIKE: list[dict[str, Any]] = [
    {"kernel_shape": [1, 1], "pads": [0, 0, 0, 0]},
    {"pads": [0, 0, 0, 0]},
    {"strides": [2, 2]},
    {"dilations": [2, 2], "pads": [2, 2, 2, 2]},
    {"group": 2},
    {"outputs": MIN_CHANNELS - 1},
    {"inputs": MIN_CHANNELS - 1},
]


@pytest.mark.parametrize("options", UNLIKE)
def test_other_convolutions_are_left(options: dict[str, Any], tmp_path: Path) -> None:
    path = convolution(tmp_path / "g.onnx", **options)
    left, counts = rewritten(path, tmp_path, filter_convolutions)
    assert counts == [0]
    assert operators(left) == operators(path)


def test_a_doubling_with_another_user_is_left(tmp_path: Path) -> None:
    more = [helper.make_node("Relu", ["doubled"], ["z"])]
    path = graph(tmp_path, doubled=True, more=more)
    result, counts = rewritten(path, tmp_path, filter_convolutions)
    assert counts == [1], "the convolution, on the doubled image"
    assert "Resize" in operators(result)
    assert_close(path, result, {"x": random(3, INPUTS, 5, 7, seed=1)})


def test_the_convolutions_of_a_real_graph_are_found(sd15_like: Exported, tmp_path: Path) -> None:
    """Finds all 3x3 convolutions of the decoder except those on latents and images; replaced weights are removed."""
    shapes = [shape for shape in weight_shapes(sd15_like.checkpoints / "base/vae", ".weight") if shape[2:] == [3, 3]]
    assert shapes
    bundle = Bundle.load(sd15_like.bundle)
    path = bundle.folder / bundle.graph("vae_decoder").path
    result, _ = rewritten(path, tmp_path, filter_convolutions)
    model = onnx.load(result, load_external_data=False)
    weights = {item.name: list(item.dims) for item in model.graph.initializer}
    left = [weights[node.input[1]] for node in model.graph.node if node.op_type == "Conv"]
    assert all(min(shape[:2]) < MIN_CHANNELS or shape[2:] == [1, 1] for shape in left)
    assert set(weights) <= {name for node in model.graph.node for name in node.input}
    feeds = random_inputs(bundle, "vae_decoder")
    ((expected,), (actual,)) = (run_portable(each, feeds) for each in (path, result))
    assert np.abs(actual["frames"].astype(int) - expected["frames"]).max() <= 1
