"""Fused attention and group norms in typed graphs."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import Exported
from sparsectrl_lcm.engine import check
from sparsectrl_lcm.engine.rewrites import attention as fusions
from sparsectrl_lcm.engine.rewrites import typed_graph as typed
from sparsectrl_lcm.runtime.format.bundle import Bundle
from standard_operators import fuse_in_standard_operators, run


def test_attention_and_group_norms_are_fused(exported: Exported) -> None:
    bundle = Bundle.load(exported.bundle)
    for graph in ("unet", "controlnet_scribble", "controlnet_rgb"):
        before = ir.load(bundle.folder / f"onnx/{graph}.onnx")
        attentions = {node.name.split("/")[0] for node in before.graph if node.op_type == "Softmax"}
        norms = [node for node in before.graph if node.op_type == "InstanceNormalization"]
        after = Counter(node.op_type for node in typed.typed_graph(bundle, graph, "fp32").graph)
        assert after["Attention"] == len(attentions) > 0
        assert after["GroupNormalization"] == len(norms) > 0
        assert after["Softmax"] == after["InstanceNormalization"] == 0


@pytest.mark.parametrize("graph", ["unet", "controlnet_rgb", "vae_decoder"])
def test_fusions_do_not_change_the_result(exported: Exported, graph: str, tmp_path: Path) -> None:
    bundle = Bundle.load(exported.bundle)
    feeds = check.random_inputs(bundle, graph)
    path = tmp_path / f"{graph}.onnx"
    typed.write_typed(typed.typed_graph(bundle, graph, "fp32", fuse_in_standard_operators), path)
    for actual, expected in zip(run(path, feeds), run(exported.bundle / f"onnx/{graph}.onnx", feeds), strict=True):
        scale = max(1, np.abs(expected.astype(np.float32)).max())
        bound = 1 if expected.dtype == np.uint8 else 1e-4 * scale  # a level may be rounded to its neighbour
        assert np.abs(actual.astype(np.float32) - expected).max() <= bound


def test_only_attention_of_transformers_is_fused() -> None:
    assert fusions.is_transformer_attention("down_blocks.0.attentions.0.transformer_blocks.0.attn2/Softmax_1")
    assert fusions.is_transformer_attention("mid_block.motion_modules.0.transformer_blocks.0.attn1/Softmax_1")
    assert not fusions.is_transformer_attention("decoder.mid_block.attentions.0/Softmax_1")
