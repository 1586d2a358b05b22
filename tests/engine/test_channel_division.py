"""Dividing channels in what computes them: the graph gives the same, and few divisions of their own are left."""

import re
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from sparsectrl_lcm.engine.check import random_inputs, run_portable
from sparsectrl_lcm.engine.quantization.layers import input_axis, layer_input, quantizable, weight_shape
from sparsectrl_lcm.engine.quantization.observer import Statistics
from sparsectrl_lcm.engine.quantization.smoothing import smooth
from sparsectrl_lcm.engine.rewrites.attention import fuse_attention, is_transformer_attention
from sparsectrl_lcm.engine.rewrites.channels_last import norm_by_channels, turn_motion_modules
from sparsectrl_lcm.engine.rewrites.exact_simplifications import split_gated_units
from sparsectrl_lcm.engine.rewrites.typed_graph import typed_graph, write_typed
from sparsectrl_lcm.runtime.format.bundle import Bundle, demo_bundle


def rewritten(bundle: Bundle, graph: str) -> ir.Model:
    """A graph in fp32 with the rewrites of int8 engines before their layers are rounded."""

    def rewrite(model: ir.Model) -> None:
        fuse_attention(model, is_transformer_attention)
        split_gated_units(model)
        turn_motion_modules(model)
        norm_by_channels(model)

    return typed_graph(bundle, graph, "fp32", rewrite)


def uneven(model: ir.Model, skipped: str = "^$") -> dict[str, Statistics]:
    """Statistics of channels that differ by orders of magnitude, for all layers but some."""
    random, seen = np.random.default_rng(0), {}
    for node in quantizable(model):
        sizes = random.normal(0, 2, weight_shape(node)[input_axis(node)])
        seen[str(node.name)] = Statistics(np.exp(sizes).astype(np.float32))
    return {layer: found for layer, found in seen.items() if not re.search(skipped, layer)}


def divided(model: ir.Model) -> dict[str, str]:
    """The kinds of layers whose input is divided by a node of its own, by the layer's name."""
    found = {}
    for node in quantizable(model):
        maker = layer_input(node).producer()
        if maker is not None and (maker.name or "").endswith(".divided/Mul"):
            found[str(node.name)] = re.sub(r"\d", "", re.sub(r"(\.\d)?/.*", "", str(node.name)).split(".")[-1])
    return found


@pytest.mark.parametrize("skipped", ["^$", r"to_k/|ff\.net\.0\.proj/MatMul_\d+\.1|conv1/"], ids=["all", "some"])
@pytest.mark.parametrize("graph", ["unet", "controlnet_scribble"])
def test_a_smoothed_graph_gives_the_same(graph: str, skipped: str, tmp_path: Path) -> None:
    """Also where one of the layers with the same input is left out, for which the input must stay."""
    bundle = Bundle.load(demo_bundle())
    feeds, model = random_inputs(bundle, graph), rewritten(bundle, graph)
    write_typed(model, tmp_path / "exact.onnx")
    (exact,) = run_portable(tmp_path / "exact.onnx", feeds)
    found = smooth(model, uneven(model, skipped))
    assert found
    write_typed(model, tmp_path / "smooth.onnx")
    (actual,) = run_portable(tmp_path / "smooth.onnx", feeds)
    for name, values in exact.items():
        assert np.abs(actual[name] - values).max() < 1e-4 * np.abs(values).max(), name


def test_which_divisions_are_left() -> None:
    """Where the input is a SiLU, which is not linear, or a residual stream, which others take too.

    A motion module's projection follows a norm as well, but its frames and pixels change places between them.
    """
    model = rewritten(Bundle.load(demo_bundle()), "unet")
    smooth(model, uneven(model))
    found = divided(model)
    assert set(found.values()) == {"conv", "conv_shortcut", "proj_in", "proj_out"}
    assert all("motion_modules" in layer for layer, kind in found.items() if kind == "proj_in")


def test_an_input_that_others_take_too_is_divided_by_itself() -> None:
    """The keys' layer is left out: the norm before it must not change."""
    model = rewritten(Bundle.load(demo_bundle()), "unet")
    smooth(model, uneven(model, "to_k/"))
    assert {"to_q", "to_v"} < set(divided(model).values())


def test_an_output_of_the_graph_is_not_divided() -> None:
    """The first norm of a transformer, given out as well."""
    model = rewritten(Bundle.load(demo_bundle()), "unet")
    seen = uneven(model)
    norm = next(node for node in model.graph if node.op_type == "LayerNormalization")
    gain = norm.inputs[1]
    model.graph.outputs.append(norm.outputs[0])
    smooth(model, seen)
    assert norm.inputs[1] is gain
