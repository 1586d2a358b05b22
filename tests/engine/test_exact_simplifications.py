"""Rewrites that give the same numbers with less work, compared with the original graphs on ONNX Runtime."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import openvino
import pytest
from conftest import Exported
from flops import count_flops
from onnx import TensorProto, helper, numpy_helper
from safetensors import safe_open
from sparsectrl_lcm.engine.check import random_inputs, run_portable
from sparsectrl_lcm.engine.rewrites.exact_simplifications import split_gated_units
from sparsectrl_lcm.engine.rewrites.typed_graph import write_typed
from sparsectrl_lcm.engine.rewrites.upsampling import (
    drop_empty_cuts,
    fold_upsampling,
    transpose_upsampling,
)
from sparsectrl_lcm.runtime.format.bundle import Bundle
from sparsectrl_lcm.runtime.format.clip_layout import ClipSize

Arrays = dict[str, np.ndarray]
DOUBLING = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
CONVOLUTION = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [1, 1], "dilations": [1, 1], "group": 1}


def write_graph(
    path: Path,
    nodes: list[onnx.NodeProto],
    weights: Arrays,
    outputs: tuple[str, ...] = ("y",),
    rank: int = 4,
    inputs: tuple[str, ...] = ("x",),
) -> Path:
    """Writes a graph with inputs of any size."""
    inward, outward = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * rank) for name in names]
        for names in (inputs, outputs)
    )
    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "g", inward, outward, initializers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def rewritten(path: Path, folder: Path, *rewrites: Callable[[ir.Model], int]) -> tuple[Path, list[int]]:
    """Rewrites a graph; returns the new file and the number of places that each rewrite has changed."""
    model = ir.load(path)
    counts = [rewrite(model) for rewrite in rewrites]
    result = folder / f"{path.stem}.rewritten.onnx"
    write_typed(model, result)
    onnx.checker.check_model(result)
    return result, counts


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def upsampler(
    path: Path, resize: dict[str, Any] | None = None, convolution: dict[str, Any] | None = None, **options: Any
) -> Path:
    """Writes a doubling and a 3x3 convolution from 4 to 6 channels, with some options changed.

    Args:
        path: the file.
        resize: attributes of the Resize that differ.
        convolution: attributes of the Conv that differ; None removes an attribute.
        options: `scales`, `bias`, `weight`, `more`: nodes whose result `z` is a second output, and `cut`: whether the
            doubling is cut to the size of a second input `skip`; `starts` are those of the cut.
    """
    attributes = {name: value for name, value in (CONVOLUTION | (convolution or {})).items() if value is not None}
    weights = {"scales": np.array(options.get("scales", (1, 1, 2, 2)), np.float32)}
    weights["weight"] = options.get("weight", random(6, 4, 3, 3))
    if options.get("bias", True):
        weights["bias"] = random(len(weights["weight"]))
    more, cut = options.get("more", []), options.get("cut", False)
    image, parameters = "cut" if cut else "doubled", list(weights)[1:]
    weights |= {"starts": np.array(options.get("starts", (0, 0))), "axes": np.array([2, 3])} if cut else {}
    nodes = [
        helper.make_node("Resize", ["x", "", "scales"], ["doubled"], name="resize", **(DOUBLING | (resize or {}))),
        helper.make_node("Shape", ["skip"], ["size"], start=2, end=4),
        helper.make_node("Slice", ["doubled", "starts", "size", "axes"], ["cut"], name="cut"),
        helper.make_node("Conv", [image, *parameters], ["convolved"], name="convolution", **attributes),
        helper.make_node("Neg", ["convolved"], ["y"]),
        *more,
    ]
    nodes = nodes if cut else [node for node in nodes if node.op_type not in ("Shape", "Slice")]
    return write_graph(path, nodes, weights, ("y", "z") if more else ("y",), inputs=("x", "skip") if cut else ("x",))


CUTS = [
    *(((1, 1), (1, 1)), ((1, 1), (2, 1)), ((1, 2), (1, 4)), ((5, 7), (9, 13)), ((5, 7), (10, 13)), ((5, 7), (10, 14))),
    *(((130, 2), (259, 4)), ((2, 130), (4, 259))),
]
"""Sizes of an image, and sizes to which its doubling is cut."""


def skip_feeds(inputs: int, shape: tuple[int, int], size: tuple[int, int]) -> Arrays:
    return {"x": random(3, inputs, *shape, seed=1), "skip": np.zeros((1, 1, *size), np.float32)}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (5, 7), (8, 4)])
def test_folded_upsampling_gives_the_same_up_to_the_border(shape: tuple[int, int], bias: bool, tmp_path: Path) -> None:
    path = upsampler(tmp_path / "g.onnx", bias=bias)
    folded, counts = rewritten(path, tmp_path, fold_upsampling)
    assert counts == [1]
    assert operators(folded) == ["Conv"] * 4 + ["Concat", "DepthToSpace", "Neg"]
    feeds = {"x": random(3, 4, *shape, seed=1)}
    ((expected,), (actual,)) = (run_portable(each, feeds) for each in (path, folded))
    assert actual["y"].shape == (3, 6, 2 * shape[0], 2 * shape[1])
    np.testing.assert_allclose(actual["y"], expected["y"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("shape", "size"), CUTS)
def test_a_folded_upsampling_that_is_cut_gives_the_same_up_to_the_border(
    shape: tuple[int, int], size: tuple[int, int], bias: bool, tmp_path: Path
) -> None:
    path = upsampler(tmp_path / "g.onnx", bias=bias, cut=True)
    folded, counts = rewritten(path, tmp_path, fold_upsampling)
    assert counts == [1]
    feeds = skip_feeds(4, shape, size)
    ((expected,), (actual,)) = (run_portable(each, feeds) for each in (path, folded))
    assert actual["y"].shape == (3, 6, *size)
    np.testing.assert_allclose(actual["y"], expected["y"], rtol=0, atol=1e-5)


def test_openvino_leaves_out_what_a_cut_of_nothing_needs(tmp_path: Path) -> None:
    """Compiled for a size that is not cut, a folded upsampling has the layers of one without a cut."""
    layers = {}
    for cut in (False, True):
        (folder := tmp_path / str(cut)).mkdir()
        path, _ = rewritten(upsampler(folder / "g.onnx", cut=cut), folder, fold_upsampling)
        for size in ((10, 14), (9, 14)):
            model = openvino.Core().read_model(path)
            model.reshape({"x": [3, 4, 5, 7]} | ({"skip": [1, 1, *size]} if cut else {}))
            compiled = openvino.Core().compile_model(model, "CPU").get_runtime_model()
            layers[cut, size] = sorted(
                f"{node.get_rt_info()['layerType'].astype(str)} {node.shape}"
                for node in compiled.get_ops()
                if node.get_output_size() and node.friendly_name != "skip"
            )
    assert layers[True, (10, 14)] == layers[False, (10, 14)]
    assert len(layers[True, (9, 14)]) > len(layers[False, (9, 14)])


@pytest.mark.parametrize(
    ("latents", "dropped"), [((8, 16), 3), ((4, 8), 2), ((2, 8), 1), ((9, 16), 0), ((36, 64), 2), ((54, 96), 2)]
)
def test_cuts_that_cut_nothing_are_dropped(latents: tuple[int, int], dropped: int, tmp_path: Path) -> None:
    """Three downsamplers and upsamplers, as in Stable Diffusion 1.5; results of a size stay the same."""
    model = ir.load(unet_of_sizes(tmp_path / "g.onnx", levels=3))
    assert drop_empty_cuts(model, *latents) == dropped
    ir.save(model, tmp_path / "dropped.onnx")
    assert operators(tmp_path / "dropped.onnx").count("Slice") == 3 - dropped
    feeds = {"x": random(2, 4, *latents)}
    ((expected,), (actual,)) = (run_portable(tmp_path / name, feeds) for name in ("g.onnx", "dropped.onnx"))
    np.testing.assert_array_equal(actual["y"], expected["y"])


def unet_of_sizes(path: Path, levels: int) -> Path:
    """Writes convolutions of stride 2, and as many upsamplers to the sizes before them."""
    weights: Arrays = {"w": random(4, 4, 3, 3), "scales": np.array((1, 1, 2, 2), np.float32)}
    weights |= {"starts": np.zeros(2, np.int64), "axes": np.array([2, 3])}
    nodes, value = [], "x"
    for level in range(levels):
        nodes.append(helper.make_node("Conv", [value, "w"], [f"down{level}"], **(CONVOLUTION | {"strides": [2, 2]})))
        value = f"down{level}"
    for level in reversed(range(levels)):
        nodes += [
            helper.make_node("Shape", [f"down{level - 1}" if level else "x"], [f"size{level}"], start=2, end=4),
            helper.make_node("Resize", [value, "", "scales"], [f"doubled{level}"], **DOUBLING),
            helper.make_node("Slice", [f"doubled{level}", "starts", f"size{level}", "axes"], [f"cut{level}"]),
            helper.make_node("Conv", [f"cut{level}", "w"], [f"up{level}"], **CONVOLUTION),
        ]
        value = f"up{level}"
    return write_graph(path, [*nodes, helper.make_node("Neg", [value], ["y"])], weights)


UNLIKE: list[dict[str, Any]] = [
    {"cut": True, "starts": (0, 1)},
    {"scales": (1, 1, 3, 3)},
    {"scales": (1, 1, 2, 1)},
    {"resize": {"mode": "linear"}},
    {"resize": {"nearest_mode": "ceil"}},
    {"resize": {"coordinate_transformation_mode": "half_pixel"}},
    {"convolution": {"kernel_shape": [1, 1], "pads": [0, 0, 0, 0]}, "weight": random(6, 4, 1, 1)},
    {"convolution": {"pads": [0, 0, 0, 0]}},
    {"convolution": {"pads": None}},
    {"convolution": {"strides": [2, 2]}},
    {"convolution": {"dilations": [2, 2]}},
    {"convolution": {"group": 2}, "weight": random(6, 2, 3, 3)},
    {"more": [helper.make_node("Relu", ["doubled"], ["z"])]},
]


@pytest.mark.parametrize("options", UNLIKE)
def test_what_is_no_doubling_before_a_plain_convolution_is_left(options: dict[str, Any], tmp_path: Path) -> None:
    path = upsampler(tmp_path / "g.onnx", **options)
    left, counts = rewritten(path, tmp_path, fold_upsampling, transpose_upsampling)
    assert counts == [0, 0]
    assert operators(left) == operators(path)


def gated(path: Path, activation: str = "Gelu", halves: int = 2) -> Path:
    """Writes a GEGLU from 5 to 6 channels as the export does: the second half of a projection gates the first."""
    weights = {"a.proj.weight": random(5, 6 * halves), "a.proj.bias": random(6 * halves)}
    parts = [f"part{index}" for index in range(halves)]
    nodes = [
        helper.make_node("MatMul", ["x", "a.proj.weight"], ["product"], name="a.proj/MatMul"),
        helper.make_node("Add", ["product", "a.proj.bias"], ["sum"], name="a.proj/Add"),
        helper.make_node("Split", ["sum"], parts, name="a/Split", axis=-1, num_outputs=halves),
        helper.make_node(activation, [parts[1]], ["gate"], name="a/Gelu"),
        helper.make_node("Mul", [parts[0], "gate"], ["y"], name="a/Mul"),
    ]
    return write_graph(path, nodes, weights, rank=3)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7)])
def test_each_half_of_a_gated_unit_gets_a_projection(shape: tuple[int, int], tmp_path: Path) -> None:
    path = gated(tmp_path / "g.onnx")
    split, counts = rewritten(path, tmp_path, split_gated_units)
    assert counts == [1]
    assert sorted(operators(split)) == ["Add", "Add", "Gelu", "MatMul", "MatMul", "Mul"]
    feeds = {"x": random(*shape, 5, seed=1)}
    ((expected,), (actual,)) = (run_portable(each, feeds) for each in (path, split))
    np.testing.assert_allclose(actual["y"], expected["y"], rtol=0, atol=1e-5)


def test_other_activations_are_left(tmp_path: Path) -> None:
    path = gated(tmp_path / "g.onnx", "Sigmoid")
    left, counts = rewritten(path, tmp_path, split_gated_units)
    assert counts == [0]
    assert operators(left) == operators(path)


def weight_shapes(folder: Path, ending: str) -> list[list[int]]:
    """Returns the shapes of a checkpoint's weights whose names have this ending, sorted by name."""
    with safe_open(next(folder.glob("*.safetensors")), "np") as file:
        return [file.get_slice(name).get_shape() for name in sorted(file.keys()) if name.endswith(ending)]


def assert_equal_results(path: Path, result: Path, feeds: Arrays) -> None:
    ((expected,), (actual,)) = (run_portable(each, feeds) for each in (path, result))
    for name, values in expected.items():
        difference = np.abs(actual[name].astype(np.float64) - values).max()
        assert difference <= (1 if values.dtype == np.uint8 else 1e-5 * np.abs(values).max())


@pytest.mark.parametrize(("graph", "part"), [("unet", "unet"), ("vae_decoder", "vae")])
def test_every_place_of_a_real_graph_is_found(sd15_like: Exported, graph: str, part: str, tmp_path: Path) -> None:
    """Finds as many places as the checkpoints have. Each upsampler keeps 4 of 9 products, and results stay the same.

    Products are counted without cuts, as in engines for one size.
    """
    folder = sd15_like.checkpoints
    gates = [weight_shapes(folder / name, ".ff.net.0.proj.weight") for name in (f"base/{part}", "motion_adapter")]
    units = sum(map(len, gates)) if graph == "unet" else 0
    upsamplers = weight_shapes(folder / "base" / part, "upsamplers.0.conv.weight")
    bundle = Bundle.load(sd15_like.bundle)
    path = bundle.folder / bundle.graph(graph).path
    result, counts = rewritten(path, tmp_path, fold_upsampling, split_gated_units)
    assert counts == [len(upsamplers), units]
    assert len(upsamplers) > 0
    model = onnx.load(result, load_external_data=False)
    used = {name for node in model.graph.node for name in node.input}
    assert {item.name for item in model.graph.initializer} <= used, "replaced weights are removed"

    assert_equal_results(path, result, random_inputs(bundle, graph))
    feeds = random_inputs(bundle, graph, size=ClipSize(width=64, height=32, frames=2))  # nothing is cut
    assert_equal_results(path, result, feeds)
    *_, height, width = feeds["latents"].shape
    frames = feeds["latents"].size // (4 * height * width)
    largest = height * width * (1 if graph == "unet" else 4 ** len(upsamplers))
    pixels = [frames * largest // 4**index for index in range(len(upsamplers))]  # of the outputs, last one first
    products = [outputs * inputs * count for (outputs, inputs, *_), count in zip(upsamplers[::-1], pixels, strict=True)]
    saved = 2 * (9 - 4) * sum(products)
    (tmp_path / "static").mkdir()
    static, _ = rewritten(
        path, tmp_path / "static", lambda model: drop_empty_cuts(model, height, width), fold_upsampling
    )
    assert count_flops(path, feeds, tmp_path) - count_flops(static, feeds, tmp_path) == saved


def test_the_convolutions_of_the_tiny_decoder_have_no_bias(exported: Exported, tmp_path: Path) -> None:
    bundle = Bundle.load(exported.bundle)
    path = bundle.folder / bundle.graph("vae_decoder_tiny").path
    result, (count,) = rewritten(path, tmp_path, fold_upsampling)
    assert 2**count == bundle.manifest.sizes.vae_scale_factor
    assert_equal_results(path, result, random_inputs(bundle, "vae_decoder_tiny"))
