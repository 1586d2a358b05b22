"""The report of an engine's kernels from the output of TensorRT's inspector, or the log of TensorRT-RTX's builder."""

import json
from typing import Any

import pytest
from sparsectrl_lcm.engine.tensorrt import layer_report
from sparsectrl_lcm.engine.tensorrt.kernels import Tensor, kernels_of_inspector, kernels_of_log
from sparsectrl_lcm.runtime.format.layer_report import LayerReport

SPATIAL = "down_blocks.0.attentions.0.transformer_blocks.0"
TEMPORAL = "down_blocks.0.motion_modules.0.temporal_transformer_blocks.0"


def kernel(name: str, kind: str, tactic: str, *nodes: str) -> dict[str, Any]:
    """Returns a layer as the inspector describes it with detailed verbosity."""
    metadata = "".join(f"[ONNX Layer: {node}]" for node in nodes)
    return {"Name": name, "LayerType": kind, "TacticName": tactic, "StreamId": 0, "Metadata": metadata}


def summarize(layers: list[Any]) -> dict[str, Any]:
    """Returns the report of what the inspector says, as it is stored."""
    return layer_report.summarize(kernels_of_inspector(json.dumps({"Layers": layers}))).model_dump(mode="json")


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
        "split_attention": [],
        "norms": 0,
        "fp32_norms": [],
        "bytes_moved": None,
        "fp16_sums": [],
        "work": [],
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
    report = summarize(layers)
    assert report["layers"] == {"unknown": 3}
    assert report["attention"] == {"spatial": {"fused": 1, "split": 0}, "temporal": {"fused": 0, "split": 0}}


def test_several_kernels_of_an_attention_are_one_split_attention() -> None:
    """Also without a softmax among them, which TensorRT's compiler may take apart."""
    node = f"{SPATIAL}.attn1/Attention_129"
    layers = [
        kernel("scores", "gemm", "t", node),
        kernel("__myl_MaxrSubExpSumDiv_myl0_24", "kgen", "t", node),
        kernel("mixed", "gemm", "t", node),
        kernel("parts", "kgen", "t", f"{SPATIAL}.attn2/Attention_130"),
        kernel("copy", "kgen", "t", f"{TEMPORAL}.attn1/Attention_131", f"{TEMPORAL}.attn1.to_q/MatMul_1"),
        fused(3, f"{TEMPORAL}.attn1"),
    ]
    report = summarize(layers)
    assert report["attention"] == {"spatial": {"fused": 0, "split": 2}, "temporal": {"fused": 1, "split": 0}}
    assert report["split_attention"] == [f"{SPATIAL}.attn1", f"{SPATIAL}.attn2"]


@pytest.mark.parametrize(
    ("words", "size"),
    [
        ("Half", 2),
        ("BFloat16", 2),
        ("Float", 4),
        ("Int32", 4),
        ("Int64", 8),
        ("Int8", 1),
        ("UInt8", 1),
        ("FP8", 1),
        ("Bool", 1),
        ("Row major linear FP16 format", 2),
        ("Channel major FP32 format where channel % 4 == 0", 4),
        ("Thirty-two wide channel vectorized row major Int8 format.", 1),
        ("N/A due to dynamic shapes", 0),
    ],
)
def test_a_tensor_has_the_size_of_its_type(words: str, size: int) -> None:
    assert Tensor("x", (2, 16, 3), words).bytes == 96 * size
    assert Tensor("x", (2, 16, 3), words).is_fp32 == (words == "Float" or "FP32" in words)


NORM = "down_blocks.0.resnets.0.norm1/GroupNormalization_66"
LAYER_NORM = f"{SPATIAL}.norm2/LayerNormalization_136"


def tensor(name: str, shape: str, words: str, layout: str = "(Linear) Row major linear format") -> str:
    """Returns a tensor as the log describes it, with strides that nobody reads."""
    strides = "Strides: [1], StrideOrder: [0]"
    return f"{{ Name: {name}, Dimensions: [{shape}], {strides}, Datatype: {words}, Format: {layout} }}"


NHWC = "(NHWC) Channel major format"
LOG = f"""Layers:
Name: __myl_Gnor_myl0_3, LayerType: kgen, \
Inputs: [ {tensor("bb1_19", "64", "Int32")}, {tensor("bb1_21", "4,32,8,8", "Half", NHWC)}], \
Constants: [ {tensor("mye291380_dconst", "1,32,1,1", "Float")}], \
Outputs: [ {tensor("mye307453", "6144", "Float")}, {tensor("bb1_23", "4,32,8,8", "TYPE", NHWC)}], \
TacticName: __myl_Gnor_0x2fd832b4, StreamId: 0, Metadata: [ONNX Layer: {NORM}]
Name: a.to_v/MatMul_1+a.to_q/MatMul_2_myl0_4, LayerType: gemm, \
Inputs: [ {tensor("x", "256,32", "Half")}, {tensor("x", "256,32", "Half")}], Constants: [], \
Outputs: [ {tensor("y", "256,64", "Half")}], \
TacticName: , StreamId: 0, Metadata: [ONNX Layer: {LAYER_NORM}][ONNX Layer: a.to_q/MatMul_2]
I/O Tensors:
 Name: latents, IOMode: Input, DataType: Float, Dimensions: [1,4,4,8,8], Location: Device
"""
"""Kernels as TensorRT-RTX 1.7 logs them, with TYPE in the place of the type that the norm writes."""


@pytest.mark.parametrize(("words", "size"), [("Float", 4), ("Half", 2)])
def test_the_log_of_tensorrt_rtx_has_kernels_norms_and_bytes(words: str, size: int) -> None:
    kernels = kernels_of_log(LOG.replace("TYPE", words))
    assert [(kernel.name, kernel.kind, kernel.tactic) for kernel in kernels] == [
        ("__myl_Gnor_myl0_3", "kgen", "__myl_Gnor_0x2fd832b4"),
        ("a.to_v/MatMul_1+a.to_q/MatMul_2_myl0_4", "gemm", ""),
    ]
    assert [tensor.shape for tensor in kernels[0].outputs] == [(6144,), (4, 32, 8, 8)]
    report = layer_report.summarize(kernels)
    assert report.layers == {"kgen": 1, "gemm": 1}
    assert report.norms == 2
    assert report.fp32_norms == ((NORM,) if words == "Float" else ()), "statistics in fp32 do not count"
    norm = 64 * 4 + 8192 * 2 + 6144 * 4 + 8192 * size
    assert report.bytes_moved == norm + 2 * (256 * 32 + 256 * 64), "a tensor that a kernel takes twice is read once"
    assert LayerReport.of({"seconds": 1.0, **report.model_dump(mode="json")}) == report


@pytest.mark.parametrize(
    ("tactic", "fp16"),
    [
        ("sm80_xmma_gemm_f16f16_f16f16_f16_tn_n_tilesize128x128x32_stage4_tensor16x8x16", True),
        ("sm80_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize128x128x32_stage4_tensor16x8x16", False),
        ("sm80_xmma_fprop_implicit_gemm_f16f16_f16f16_f16_nhwckrsc_nhwc_tilesize256x128x32", True),
        ("sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize128x64x64", False),
        ("ampere_h16816gemm_128x128_ldg8_stages_32x5_nn", True),
        ("ampere_fp16_s16816gemm_fp16_128x128_ldg8_f2f_stages_32x5_nn", False),
        ("cutlass3x_sm90_tensorop_h64x128x16gemm_f16_f16_f16_f16_f16_128x128x64", True),
        ("cutlass3x_sm90_tensorop_s64x128x16gemm_f16_f16_f32_f16_f16_128x128x64", False),
        ("sm80_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x32", False),
        ("__myl_ReshTran_0xf16f16f16", False),
        ("", False),
    ],
)
def test_kernels_that_add_in_fp16_are_named(tactic: str, fp16: bool) -> None:
    """By the names of cutlass, cuDNN and xmma, which full TensorRT gives; those of TensorRT-RTX say nothing."""
    report = summarize([kernel("scores_myl0_6", "gemm", tactic, f"{SPATIAL}.attn1.to_q/MatMul")])
    assert report["fp16_sums"] == (["scores_myl0_6"] if fp16 else [])


def layer(name: str, kind: str, inputs: list[str], constants: list[str], outputs: list[str], words: str) -> str:
    """Returns a line of the log of TensorRT-RTX; the type of inputs and constants is `words`."""
    before, weights = (
        ", ".join(tensor(f"x{place}", shape, words) for place, shape in enumerate(shapes))
        for shapes in (inputs, constants)
    )
    after = ", ".join(tensor(f"y{place}", shape, "Half") for place, shape in enumerate(outputs))
    constants = ", ".join(filter(None, (weights, tensor("alpha", "1", "Float"))))
    return (
        f"Name: {name}, LayerType: {kind}, Inputs: [ {before}], Constants: [ {constants}], "
        f"Outputs: [ {after}], TacticName: , StreamId: 0, Metadata: [ONNX Layer: a]"
    )


@pytest.mark.parametrize(
    ("line", "operation", "precision", "flops"),
    [
        (("a.to_q/MatMul_myl0_4", "gemm", ["256,32"], ["32,64"], ["256,64"], "Half"), "product", "fp16", 256 * 32 * 64),
        (("q+k+v", "gemm", ["256,32"], ["3,32,32"], ["3,256,32"], "Half"), "product", "fp16", 256 * 32 * 96),
        (("proj_in", "gemm", ["4,32,64"], ["1,32,48"], ["4,48,64"], "Half"), "product", "fp16", 4 * 64 * 32 * 48),
        (("scores", "gemm", ["8,64,32", "8,32,16"], [], ["8,64,16"], "Half"), "product", "fp16", 8 * 64 * 32 * 16),
        (
            ("__myl_FcAddAdd_myl0_4", "runtime_fusion", ["256,32", "256,128"], ["1,32", "128,32"], ["256,32"], "FP8"),
            "product",
            "fp8",
            256 * 128 * 32,
        ),
        (
            (
                "decoder.conv_in/Conv_9_myl0_2",
                "correlation",
                ["8,4,6,6"],
                ["16,4,3,3", "1,16,1,1"],
                ["8,16,6,6"],
                "FP8",
            ),
            "convolution",
            "fp8",
            8 * 16 * 36 * 4 * 9,
        ),
        (
            ("upsamplers.0", "deconv", ["8,4,6,6"], ["4,16,4,4"], ["8,16,12,12"], "Half"),
            "convolution",
            "fp16",
            8 * 36 * 4 * 16 * 16,
        ),
        (
            ("_gemm_mha_v2_myl0_26", "kgen", ["32,64,40", "32,40,77", "32,77,40"], [], ["32,64,40"], "Half"),
            "attention",
            "fp16",
            2 * 32 * 64 * 77 * 40,
        ),
        (("to_out_myl0_5", "gemm", ["256,32"], ["32,64"], ["256,64"], "Int8"), "product", "int8", 256 * 32 * 64),
        (("__myl_SiluGnor_myl0_7", "kgen", ["8,64"], ["8,64"], ["8,64"], "Float"), "other", "fp32", 0),
    ],
)
def test_the_work_of_a_kernel(line: Any, operation: str, precision: str, flops: int) -> None:
    """Two operations for each product that is added, counted from the sides of the operands by hand."""
    (found,) = layer_report.summarize(kernels_of_log(layer(*line))).work
    assert (found.operation, found.precision, found.count, found.flops) == (operation, precision, 1, 2 * flops)


def test_equal_kernels_are_one_group_with_the_bytes_of_one() -> None:
    line = layer("a_myl0_4", "gemm", ["256,32"], ["32,64"], ["256,64"], "Half")
    (found,) = layer_report.summarize(kernels_of_log(f"{line}\n{line.replace('a_myl0_4', 'b_myl0_9')}")).work
    assert (found.count, found.bytes) == (2, 2 * (256 * 32 + 32 * 64 + 256 * 64) + 4)


def test_records_of_other_engines_have_no_layer_report() -> None:
    assert LayerReport.of({"errors": {}}) is None
    assert LayerReport.of({"layers": "none", "attention": {}}) is None
    older = {"layers": {"kgen": 3}, "attention": {"spatial": {"fused": 1, "split": 0}}}
    found = LayerReport.of(older)
    assert found is not None
    assert (found.kernels, found.bytes_moved) == (3, None)
