"""Motion modules whose rows stay in the order of images: the results are those of the portable graphs."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from sparsectrl_lcm.engine import check
from sparsectrl_lcm.engine.rewrites.attention import fuse_attention, is_transformer_attention
from sparsectrl_lcm.engine.rewrites.attention_steps import write_out_attention
from sparsectrl_lcm.engine.rewrites.frames_first import keep_frames_first
from sparsectrl_lcm.engine.rewrites.typed_graph import IR_VERSION, fuse_for_tensorrt, write_typed
from sparsectrl_lcm.runtime.format.bundle import Bundle

MODULES = {"unet": 9, "controlnet_scribble": 3}
"""Motion modules of the demo bundle's graphs."""


def rewritten(graph: str) -> ir.Model:
    bundle = Bundle.load()
    model = ir.load(bundle.folder / bundle.graph(graph).path)
    fuse_for_tensorrt(model)
    assert keep_frames_first(model) == MODULES[graph]
    return model


@pytest.mark.parametrize("graph", MODULES)
def test_results_are_those_of_the_portable_graph(graph: str, tmp_path: Path) -> None:
    bundle = Bundle.load()
    model = rewritten(graph)
    write_out_attention(model, ir.DataType.FLOAT)
    model.ir_version = IR_VERSION
    write_typed(model, tmp_path / "rewritten.onnx")
    feeds = check.random_inputs(bundle, graph)
    (expected,) = check.run_portable(bundle.folder / bundle.graph(graph).path, feeds)
    (actual,) = check.run_portable(tmp_path / "rewritten.onnx", feeds)
    for name, values in expected.items():
        assert np.abs(actual[name] - values).max() <= 2e-5 * np.abs(values).max(), name


def test_modules_without_a_fused_norm_are_left() -> None:
    """Such as those whose norm takes the frames of a clip side by side."""
    bundle = Bundle.load()
    model = ir.load(bundle.folder / bundle.graph("unet").path)
    fuse_attention(model, is_transformer_attention)
    before = [(node.name, node.inputs) for node in model.graph]
    assert keep_frames_first(model) == 0
    assert [(node.name, node.inputs) for node in model.graph] == before
