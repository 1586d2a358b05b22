"""The model of a request's time on a GPU, from files of kernels. Expected times are computed by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from sparsectrl_lcm.runtime.format.layer_report import KernelGroup

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import kernel_reports  # noqa: E402
import roofline  # noqa: E402
from devices import Device  # noqa: E402
from kernel_reports import Kernels  # noqa: E402

SIMPLE = Device("simple", 100e12, 200e12, 400e12, 10e12, 1e12, "made up", 0.5, 0.25, 0.5, 1e-6)
PRODUCT = KernelGroup(operation="product", precision="fp16", count=2, flops=10**9, bytes=10**6)
COPY = KernelGroup(operation="other", precision="fp16", count=1, bytes=10**7)
ATTENTION = KernelGroup(operation="attention", precision="fp16", count=1, flops=10**9, head=40, bytes=10**6)
TINY = Kernels("tiny", "64x64x8", 3, {"text_encoder": (COPY,), "unet": (PRODUCT, ATTENTION), "vae_decoder": (COPY,)})
FULL = sorted(BENCHMARKS.glob("results/*-kernels-*.json"))


@pytest.mark.parametrize(
    ("group", "arithmetic", "memory", "launches"),
    [
        (PRODUCT, 2 * 1e9 / 50e12, 0.0, 2e-6),
        (PRODUCT.model_copy(update={"precision": "fp8"}), 2 * 1e9 / 200e12, 0.0, 2e-6),
        (PRODUCT.model_copy(update={"precision": "fp32"}), 2 * 1e9 / 5e12, 0.0, 2e-6),
        (PRODUCT.model_copy(update={"bytes": 10**8}), 0.0, 2 * 1e8 / 0.5e12, 2e-6),
        (COPY, 0.0, 1e7 / 0.5e12, 1e-6),
        (ATTENTION, 1e9 * 64 / 40 / 25e12, 0.0, 1e-6),
        (ATTENTION.model_copy(update={"head": 160}), 1e9 * 256 / 160 / 25e12, 0.0, 1e-6),
    ],
)
def test_a_kernel_takes_the_longer_of_arithmetic_and_memory(
    group: KernelGroup, arithmetic: float, memory: float, launches: float
) -> None:
    found = roofline.kernel_time(group, SIMPLE)
    assert (found.arithmetic, found.memory, found.launches) == pytest.approx((arithmetic, memory, launches))


def test_stages_run_as_often_as_in_a_request() -> None:
    stages = roofline.stage_times(TINY, SIMPLE, steps=4)
    copy, unet = 21e-6, 2 * 20e-6 + 64e-6 + 3e-6
    assert {stage: time.total for stage, time in stages.items()} == pytest.approx(
        {"text": copy, "denoise": 4 * unet, "decode": 3 * copy}
    )
    kinds = roofline.request_times(stages)
    assert kinds["second_seed"].total == pytest.approx(4 * unet + 3 * copy)
    assert kinds["new_keyframes"].total - kinds["second_seed"].total == pytest.approx(copy)


def test_fp16_sums_take_their_own_rate_and_fp8_replaces_fp16() -> None:
    assert roofline.kernel_time(PRODUCT, SIMPLE, fp16_sums=True).arithmetic == pytest.approx(2 * 1e9 / 100e12)
    product, attention = roofline.as_fp8(TINY).graphs["unet"]
    assert (product.precision, attention.precision) == ("fp8", "fp16")


def test_measured_rows_stand_beside_the_model() -> None:
    """As gpu.py and lease_report.py write them; the measurements are made up."""
    medians = {"second_seed": {"wall": 0.001, "denoise": 0.000856}, "new_keyframes": {"wall": 0.002}}
    reports = [
        {"rows": [{"contender": "tensorrt", "mode": "graphs", "p50": medians}, {"contender": "late", "p50": {}}]},
        {"contenders": {"tensorrt, graphs": {"mode": None, "p50": medians}}},
    ]
    for report in reports:
        _, _, *rows = roofline.comparison(report, TINY, SIMPLE, steps=4)
        assert "| tensorrt, graphs | second seed | denoise | 0.9 | 0.4 | 2.00 |" in rows
        assert len(rows) == 3


def test_a_file_of_kernels_is_read_as_it_was_written(tmp_path: Path) -> None:
    kernel_reports.write(tmp_path / "kernels.json", TINY, {"date": "2026-01-01"})
    assert kernel_reports.read(tmp_path / "kernels.json") == TINY
    assert json.loads((tmp_path / "kernels.json").read_text())["date"] == "2026-01-01"


@pytest.mark.parametrize("path", FULL, ids=lambda path: path.stem)
def test_the_operations_of_the_full_size_kernels_are_those_of_the_graphs(path: Path) -> None:
    """Counted by flops.py in the portable graphs at 512x512x16. A transposed convolution saves 6.2 TFLOP."""
    counted = {"controlnet_scribble": 5.254e12, "unet": 17.63e12, "vae_decoder": 40.23e12}
    kernels = kernel_reports.read(path)
    if "transposed" in path.stem:
        # 4 products for each result instead of 9, in 11.13 TFLOP of convolutions
        counted["vae_decoder"] -= 6.18e12
    for graph in counted.keys() & kernels.graphs.keys():
        runs = kernels.decoder_runs if graph == "vae_decoder" else 1
        found = runs * sum(group.count * group.flops for group in kernels.graphs[graph])
        assert found == pytest.approx(counted[graph], rel=0.005)


def test_anyone_can_run_it(tmp_path: Path) -> None:
    measured = tmp_path / "measured.json"
    rows = [{"contender": "tensorrt", "mode": "", "p50": {"second_seed": {"wall": 0.5}}}]
    measured.write_text(json.dumps({"rows": rows}))
    options = ["--assume-fp8", "--compare", str(measured), "--picture", str(tmp_path / "model.png")]
    command = [sys.executable, str(BENCHMARKS / "roofline.py"), str(FULL[-1]), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "| H200, modelled ms | new keyframes | next seed |" in done.stdout
    assert "| tensorrt | second seed | wall | 500.0 |" in done.stdout
    assert (tmp_path / "model.png").read_bytes().startswith(b"\x89PNG")
    missing = subprocess.run([*command[:2], str(tmp_path / "no.json")], capture_output=True, text=True, check=False)
    assert missing.returncode == 1
    assert len(missing.stderr.splitlines()) == 1
