"""What TensorRT-RTX makes of a UNet's first two levels in fp8 at true width, from the log of its builder."""

import pytest
from sparsectrl_lcm.engine.quantization.layers import quantizable
from sparsectrl_lcm.engine.rewrites.accumulation import accumulate_in_fp32
from sparsectrl_lcm.engine.rewrites.frames_first import keep_frames_first
from sparsectrl_lcm.engine.rewrites.precision import assign_types
from sparsectrl_lcm.engine.rewrites.typed_graph import fuse_for_tensorrt
from sparsectrl_lcm.engine.tensorrt.fp8 import to_fp8
from sparsectrl_lcm.engine.tensorrt.kernels import Kernel
from sparsectrl_lcm.engine.tensorrt.layer_report import summarize
from true_width import ATTENTIONS, compiled, true_width_graph

RANGE = 20.0
"""Magnitude that becomes 448 in all layers; it changes no kernel."""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[Kernel]:
    """The kernels of the graph with fp8 layers in fp16."""
    model = true_width_graph()
    fuse_for_tensorrt(model)
    assert keep_frames_first(model) == 2
    assign_types(model, "fp16", low_norms=True)
    to_fp8(model, {str(node.name): RANGE for node in quantizable(model)})
    accumulate_in_fp32(model)
    return compiled(model, tmp_path_factory.mktemp("typed") / "unet.onnx")


def test_nearly_all_products_and_convolutions_are_in_fp8(kernels: list[Kernel]) -> None:
    """The others are keys and values of the text, and projections of the timestep."""
    assert summarize(kernels).share("fp8") > 0.95


def test_every_attention_is_one_kernel_that_writes_fp8(kernels: list[Kernel]) -> None:
    report = summarize(kernels)
    assert report.split_attention == ()
    fused = [kernel for kernel in kernels if kernel.name.startswith("_gemm_mha")]
    assert {node.rpartition("/")[0] for kernel in fused for node in kernel.nodes} >= set(ATTENTIONS)
    assert {kernel.outputs[0].format for kernel in fused} == {"FP8"}


def test_no_layer_and_no_group_norm_reads_or_writes_fp32(kernels: list[Kernel]) -> None:
    """Factors of weights, biases and casts are part of the layers before them, and casts of no sum before a norm."""
    wide = [
        kernel.name
        for kernel in kernels
        if kernel.kind in ("gemm", "correlation") or any("/GroupNormalization" in node for node in kernel.nodes)
        for tensor in kernel.inputs + kernel.outputs
        if tensor.is_fp32 and tensor.bytes >= 10**6
    ]
    assert wide == []


def test_the_kernels_move_no_more_than_they_did(kernels: list[Kernel]) -> None:
    """Bytes that a GPU reads and writes decide the time of most kernels; a change of the graph changes this figure."""
    assert summarize(kernels).bytes_moved == pytest.approx(8_213_268_224, rel=0.02)
