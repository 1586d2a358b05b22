"""What TensorRT-RTX makes of a UNet's first two levels at true width, from the log of its builder; needs no GPU."""

import pytest
from sparsectrl_lcm.engine.rewrites.accumulation import accumulate_in_fp32
from sparsectrl_lcm.engine.rewrites.frames_first import keep_frames_first
from sparsectrl_lcm.engine.rewrites.precision import assign_types
from sparsectrl_lcm.engine.rewrites.typed_graph import fuse_for_tensorrt
from sparsectrl_lcm.engine.tensorrt.kernels import Kernel
from sparsectrl_lcm.engine.tensorrt.layer_report import summarize
from true_width import ATTENTIONS, GROUP_NORMS, compiled, true_width_graph

LONG_SUMS = 49
"""Products and 3x3 convolutions of the graph; its others are projections of the timestep, and 1x1 convolutions."""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[Kernel]:
    """The kernels of the typed graph in fp16, whose long sums are asked for in fp32."""
    model, path = true_width_graph(), tmp_path_factory.mktemp("typed") / "unet.onnx"
    fuse_for_tensorrt(model)
    assert keep_frames_first(model) == 2
    assign_types(model, "fp16")
    assert accumulate_in_fp32(model) == LONG_SUMS
    return compiled(model, path)


def test_every_attention_is_one_fused_kernel(kernels: list[Kernel]) -> None:
    """Also over time, with 32,768 rows of batch and heads, and to the text from 65,536 positions."""
    report = summarize(kernels)
    assert report.split_attention == ()
    assert {kind: counts.fused for kind, counts in report.attention.items()} == {"spatial": 4, "temporal": 4}
    fused = [kernel for kernel in kernels if kernel.name.startswith("_gemm_mha")]
    assert {node.rpartition("/")[0] for kernel in fused for node in kernel.nodes} == set(ATTENTIONS)
    for kernel in kernels:
        scores = [tensor for tensor in kernel.outputs if tensor.shape[-2:] == (4096, 4096)]
        assert not scores, "no kernel writes a score matrix"


def test_no_large_fp32_tensor_leaves_a_group_norm(kernels: list[Kernel]) -> None:
    """Statistics do: 24,576 partial sums. The tensor between a norm and its SiLU is 84 MB in fp32."""
    seen = set()
    for kernel in kernels:
        norms = {node.rpartition("/")[0] for node in kernel.nodes if "/GroupNormalization" in node}
        seen |= norms
        large = [tensor for tensor in kernel.outputs if tensor.is_fp32 and tensor.bytes >= 10**6]
        assert not norms or not large, (kernel.name, large)
    assert seen == set(GROUP_NORMS)
    assert not any("/GroupNormalization" in norm for norm in summarize(kernels).fp32_norms)


def test_the_kernels_move_no_more_than_they_did(kernels: list[Kernel]) -> None:
    """Bytes that a GPU reads and writes decide the time of most kernels; a change of the graph changes this figure."""
    assert summarize(kernels).bytes_moved == pytest.approx(8_171_226_880, rel=0.02)


def test_products_that_ask_for_fp32_sums_read_and_write_fp16(kernels: list[Kernel]) -> None:
    """The casts are part of the kernels, and q, k and v stay one product."""
    layers = [kernel for kernel in kernels if kernel.kind in ("gemm", "correlation")]
    parts = [{node.rpartition("/")[0].rpartition(".")[2] for node in kernel.nodes} for kernel in layers]
    merged = [names for names in parts if {"to_q", "to_k", "to_v"} <= names]
    assert len(layers) >= 19
    assert len(merged) == 6, "q, k and v of two spatial and four temporal self-attentions"
    assert not [kernel.name for kernel in layers for tensor in kernel.inputs + kernel.outputs if tensor.is_fp32]
