"""The summary of an engine's layers from the output of TensorRT's inspector."""

import json
from typing import Any

import pytest
from sparsectrl_lcm.engine.tensorrt.layer_report import summarize

SPATIAL = "down_blocks.0.attentions.0.transformer_blocks.0"
TEMPORAL = "down_blocks.0.motion_modules.0.temporal_transformer_blocks.0"


def kernel(name: str, kind: str, tactic: str, *nodes: str) -> dict[str, Any]:
    """Returns a layer as the inspector describes it with detailed verbosity."""
    metadata = "".join(f"[ONNX Layer: {node}]" for node in nodes)
    return {"Name": name, "LayerType": kind, "TacticName": tactic, "StreamId": 0, "Metadata": metadata}


def fused(place: int, attention: str) -> dict[str, Any]:
    return kernel(f"_gemm_mha_v2_myl0_{place}", "kgen", "_gemm_mha_v2_0x957a2fe2", f"{attention}/Attention")


def test_layers_are_counted_by_type() -> None:
    layers = [
        kernel("conv_in/Conv", "CaskConvolution", "sm90_xmma_fprop", "conv_in/Conv"),
        fused(1, f"{SPATIAL}.attn1"),
        fused(2, f"{SPATIAL}.attn2"),
    ]
    assert summarize(layers)["layers"] == {"kgen": 2, "CaskConvolution": 1}
    assert summarize([]) == {
        "layers": {},
        "attention": {"spatial": {"fused": 0, "split": 0}, "temporal": {"fused": 0, "split": 0}},
    }


def test_fused_attention_is_counted_apart_for_space_and_time() -> None:
    layers = [
        kernel("to_q_myl0_0", "gemm", "sm90_xmma_gemm_f16f16", f"{SPATIAL}.attn1.to_q/MatMul"),
        fused(1, f"{SPATIAL}.attn1"),
        fused(2, f"{SPATIAL}.attn2"),
        fused(3, f"{TEMPORAL}.attn1"),
        kernel("__myl_Cast_myl0_4", "kgen", "__myl_Cast_0x1", "text_model.encoder.layers.0.self_attn/Cast"),
    ]
    assert summarize(layers)["attention"] == {
        "spatial": {"fused": 2, "split": 0},
        "temporal": {"fused": 1, "split": 0},
    }


@pytest.mark.parametrize(
    ("name", "kind", "tactic"),
    [
        (f"{SPATIAL}.attn1/Softmax", "SoftMaxV2", "softmax_warp"),
        ("ForeignNode_7", "SoftMaxV2", "warp"),
        ("softmax_myl0_7", "kgen", "warp"),
        ("__myl_MulAddMaxSubExpSumDivMul_myl0_7", "kgen", "__myl_MulAddMaxSubExpSumDivMul_0x5ec1f0b1"),
    ],
)
def test_a_softmax_within_an_attention_is_a_split_one(name: str, kind: str, tactic: str) -> None:
    layers = [
        kernel("scores_myl0_6", "gemm", "sm90_xmma_gemm_f16f32", f"{SPATIAL}.attn1/Attention"),
        kernel(name, kind, tactic, f"{SPATIAL}.attn1/Attention"),
        kernel("mixed_myl0_8", "gemm", "sm90_xmma_gemm_f16f32", f"{SPATIAL}.attn1/Attention"),
        kernel("vae_softmax", kind, tactic, "decoder.mid_block.attention/Softmax"),
    ]
    assert summarize(layers)["attention"] == {
        "spatial": {"fused": 0, "split": 1},
        "temporal": {"fused": 0, "split": 0},
    }


def test_every_split_attention_is_counted_for_itself() -> None:
    layers = [
        kernel("softmax_1", "kgen", "t", f"{SPATIAL}.attn1/Attention"),
        kernel("__myl_MaxSubExp_2", "kgen", "t", f"{SPATIAL}.attn2/Attention"),
        kernel("__myl_MAXSUBEXP_3", "kgen", "t", f"{TEMPORAL}.attn1/Attention"),
        fused(4, f"{TEMPORAL}.attn2"),
    ]
    assert summarize(layers)["attention"] == {
        "spatial": {"fused": 0, "split": 2},
        "temporal": {"fused": 1, "split": 1},
    }


@pytest.mark.parametrize("kind", ["SoftMaxV2", "kgen"])
def test_a_fused_attention_is_not_split_whatever_it_is_called(kind: str) -> None:
    layer = kernel("_gemm_mha_v2_softmax_maxsubexp", kind, "_gemm_mha_v2_0x957a2fe2", f"{SPATIAL}.attn1/Attention")
    assert summarize([layer])["attention"]["spatial"] == {"fused": 1, "split": 0}


def test_only_its_own_name_and_type_make_a_softmax_of_a_layer() -> None:
    """The metadata of a matrix product may name a softmax beside it in the graph."""
    layers = [
        kernel("scores", "gemm", "sm90_xmma_gemm_softmax", f"{SPATIAL}.attn1/MatMul", f"{SPATIAL}.attn1/Softmax"),
        kernel("mixed", "gemm", "sm90_xmma_gemm_maxsubexp", f"{SPATIAL}.attn1/MaxSubExp"),
    ]
    assert summarize(layers)["attention"]["spatial"] == {"fused": 0, "split": 0}


def test_layers_may_be_names_alone() -> None:
    """The inspector gives only names if the engine was built without detailed verbosity."""
    layers = ["conv_in/Conv", f"_gemm_mha_v2 {SPATIAL}.attn1/Attention", f"{TEMPORAL}.attn1.to_q/MatMul"]
    assert summarize(json.loads(json.dumps(layers))) == {
        "layers": {"unknown": 3},
        "attention": {"spatial": {"fused": 1, "split": 0}, "temporal": {"fused": 0, "split": 0}},
    }
