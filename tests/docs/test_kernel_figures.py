"""The tables of kernels and sums, and what follows from them, in docs/gpu.md match the results files."""

import sys
from collections.abc import Iterator
from itertools import chain
from typing import Any

import pytest
from documents import ROOT
from result_tables import RESULTS, kernel_rows, read

sys.path.append(str(ROOT / "benchmarks"))

import accumulation_errors
import kernel_reports
import roofline
from devices import DEVICES

PAGE = (ROOT / "docs/gpu.md").read_text()
TEXT = " ".join(PAGE.split())
ACCUMULATION = "2026-11-30-accumulation-errors.json"
FP16, FP16_DECODER, FP16_UNET, FP8, TRANSPOSED, AS_EXPORTED, FP8_ALONE = (
    f"2026-11-30-tensorrt-rtx-build-cpu-{name}.json" for name in ("6", "7", "8", "5", "transposed-2", "4", "9")
)
SETS = [f"2026-11-30-kernels-{name}.json" for name in ("fp16", "fp16-transposed", "fp8", "fp8-transposed")]
RANGES, SCALES = "2026-11-30-fp8-ranges.json", "2026-11-30-fp8-weight-scales.json"


def test_errors_of_sums_are_those_of_the_results() -> None:
    assert "\n".join(accumulation_errors.table(read(ACCUMULATION)["errors"])) in PAGE
    assert f"(../benchmarks/results/{ACCUMULATION})" in PAGE


def built(file: str, precision: str) -> dict[str, Any]:
    """The graphs that were built in a precision."""
    found: dict[str, Any] = read(file)["builds"][precision]
    return found


def test_kernels_of_the_full_size_engines_are_those_of_the_results() -> None:
    fp16 = built(FP16, "fp16") | built(FP16_UNET, "fp16") | built(FP16_DECODER, "fp16")
    fp8 = built(FP8, "fp8")
    rows = chain(
        kernel_rows("fp16", fp16),
        kernel_rows("fp16, transposed upsampling", built(TRANSPOSED, "fp16")),
        kernel_rows("fp8", fp8),
        kernel_rows("fp8, transposed upsampling", built(TRANSPOSED, "fp8")),
    )
    assert "\n".join(rows) in PAGE
    assert all(f"(../benchmarks/results/{file})" in PAGE for file in (FP16, FP16_UNET, FP16_DECODER, FP8, TRANSPOSED))
    assert fp16["vae_decoder"]["gb_moved"] <= 42
    assert not any(row["fp32_group_norms"] for row in (fp16 | fp8).values())
    quantized = {graph: row for graph, row in fp8.items() if row["fp8_share"]}
    assert quantized.keys() == {"controlnet_scribble", "controlnet_rgb", "unet", "vae_decoder"}
    assert all(row["fp8_share"] >= 0.9 and row["peak_gb"] <= 16 for row in quantized.values())


@pytest.mark.parametrize("file", SETS)
def test_modelled_milliseconds_are_those_of_the_kernels(file: str) -> None:
    kernels = kernel_reports.read(RESULTS / file)
    head, _, row = roofline.table([kernels], DEVICES["H200"], steps=4)
    assert head in PAGE and row in PAGE
    kinds = roofline.request_times(roofline.stage_times(kernels, DEVICES["H200"], steps=4))
    if kernels.label.startswith("fp8"):
        assert all(1e3 * time.total <= roofline.GOALS[kind] for kind, time in kinds.items())


def claims() -> Iterator[tuple[str, str]]:
    """Texts of docs/gpu.md, and the results file beside them."""
    fp16, fp8 = built(FP16_UNET, "fp16"), built(FP8, "fp8")
    shares = [f"{fp8[graph]['fp8_share_with_attention']:.1%}" for graph in ("unet", "controlnet_scribble")]
    assert len(set(shares)) == 1
    rgb = fp8["controlnet_rgb"]["fp8_share_with_attention"]
    yield f"the share is {shares[0]} for the UNet and the SparseCtrl for scribbles, {rgb:.1%} for that for rgb", FP8
    yield f"and {1 - fp8['unet']['fp8_share']:.2%} of the UNet.", FP8
    yield f"In fp16, {fp16['unet']['fp32_norms']} of its 108 layer norms do", FP16_UNET
    before = built(AS_EXPORTED, "fp16")["unet"]
    yield f"moved {before['gb_moved']:.1f} GB in {sum(before['kernels'].values())} kernels in fp16", AS_EXPORTED
    alone = built(FP8_ALONE, "fp8")["unet"]
    yield f"takes {alone['total_seconds']:.0f} s and {alone['peak_gb']:.1f} GB", FP8_ALONE
    yield f"{alone['build_seconds']:.0f} s of them in TensorRT-RTX", FP8_ALONE
    graphs = read(RANGES)["graphs"]
    for graph, after in (("unet", " layers"), ("controlnet_scribble", " (scribbles)"), ("controlnet_rgb", " (rgb)")):
        yield f"{graphs[graph]['above_2']} of {graphs[graph]['layers']}{after}", RANGES
    one, each = read(SCALES)["vae_decoder"].values()
    yield f"move {each['gb_moved']:.1f} GB for 8 frames instead of {one['gb_moved']:.1f}", SCALES


@pytest.mark.parametrize(("text", "file"), claims())
def test_claims_hold(text: str, file: str) -> None:
    assert text in TEXT
    assert f"(../benchmarks/results/{file})" in PAGE
