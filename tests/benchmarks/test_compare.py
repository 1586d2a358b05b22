"""The comparison with diffusers: evaluation of samples, and a run of the program with one contender."""

import json
import shutil
import subprocess
import sys
from argparse import ArgumentTypeError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sparsectrl_lcm.benchmarks.harness.measured_requests import RequestSize
from sparsectrl_lcm.runtime.format.bundle import demo_bundle
from sparsectrl_lcm.runtime.format.manifest import read_manifest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import compare_report  # noqa: E402
import cpu_contenders  # noqa: E402
import frame_differences  # noqa: E402
import models  # noqa: E402
import scaling  # noqa: E402


def row(first: list[float], second: list[float] | None = None, **more: Any) -> dict[str, Any]:
    """A row of compare.py for a contender whose stages take fixed shares of its requests."""
    shares = {"text": 0.01, "control": 0.2, "denoise": 0.5, "decode": 0.25, "total": 1.0}
    samples = {"first": {stage: [share * value for value in first] for stage, share in shares.items()}}
    if second:
        samples["second_seed"] = {stage: [value * shares[stage] for value in second] for stage in ("denoise", "total")}
    graphs = {"graphs": cpu_contenders.GRAPHS, "element_bytes": 4}
    return {"samples": samples, "probes": [], "peak_bytes": 7 * 10**9, "failed": None, **graphs, **more}


@pytest.fixture
def report() -> dict[str, Any]:
    limits = [{"flops_per_s": value, "bytes_per_s": 4e10} for value in (1e12, 3e12, 2e12)]
    found = {
        "request": RequestSize(256, 256, 16).as_dict(),
        "threads": 2,
        "machine": {"processor": "a processor"},
        "work": {"unet": {"flops": 5 * 10**12, "elements": 10**10}},
        "contenders": {
            "diffusers-fp32": row([120.0, 100.0, 110.0]),
            "diffusers-bf16": row([60.0, 50.0, 70.0], probes=limits),
            "openvino-bf16": row([20.0, 10.0, 30.0], [8.0, 12.0, 10.0], difference={"mean": 0.25, "max": 3}),
            "openvino-fp32": {**row([]), "samples": {}, "failed": "ended with code 1"},
        },
    }
    compare_report.evaluate(found, "diffusers-fp32")
    return found


def test_ratios_are_those_of_the_medians_of_one_run(report: dict[str, Any]) -> None:
    ours = report["contenders"]["openvino-bf16"]
    assert report["baselines"] == {"reference": "diffusers-fp32", "fastest": "diffusers-bf16"}
    assert ours["times_faster"]["reference"] == {"first": 110 / 20, "second_seed": 110 / 10}
    assert ours["times_faster"]["fastest"] == {"first": 60 / 20, "second_seed": 60 / 10}
    assert ours["flops_per_s"] == {"denoise": 4 * 5e12 / (0.5 * 20)}
    assert report["limits"] == {"flops_per_s": 2e12, "bytes_per_s": 4e10}
    assert ours["of_product"] == pytest.approx(1.0)


def test_without_the_baseline_there_are_no_ratios(report: dict[str, Any]) -> None:
    del report["contenders"]["diffusers-fp32"], report["contenders"]["diffusers-bf16"]
    compare_report.evaluate(report, "diffusers-fp32")
    ours = report["contenders"]["openvino-bf16"]
    assert ours["times_faster"] == {"reference": {}, "fastest": {}}
    assert (report["limits"], ours["of_product"]) == (None, None)
    assert "| 20.0 (10.0 .. 30.0) | 10.0 (8.00 .. 12.0) | - | - |" in compare_report.markdown_table(report)


def test_a_tiny_decoder_is_compared_with_diffusers_and_a_tiny_decoder(report: dict[str, Any]) -> None:
    rows = report["contenders"]
    tiny = {"graphs": cpu_contenders.graphs_of("openvino-int8-tiny")}
    rows["openvino-int8-tiny"] = row([8.0], [5.0], **tiny)
    compare_report.evaluate(report, "diffusers-fp32")
    assert rows["openvino-int8-tiny"]["times_faster"]["fastest"] == {}, "no diffusers with a tiny decoder was measured"
    rows["diffusers-bf16-tiny"] = row([40.0], **tiny)
    rows["diffusers-bf16-tiny-compiled"] = row([48.0], **tiny)
    compare_report.evaluate(report, "diffusers-fp32")
    assert report["baselines"] == {
        "reference": "diffusers-fp32",
        "fastest": "diffusers-bf16",
        "fastest_tiny": "diffusers-bf16-tiny",
    }
    assert rows["openvino-int8-tiny"]["times_faster"]["fastest"] == {"first": 40 / 8, "second_seed": 40 / 5}
    assert rows["openvino-bf16"]["times_faster"]["fastest"] == {"first": 60 / 20, "second_seed": 60 / 10}


def test_frames_are_compared_with_those_of_diffusers_fp32(tmp_path: Path) -> None:
    names = ["diffusers-bf16-tiny", "openvino-bf16", "openvino-int8-tiny"]
    files = frame_differences.warm_up_files(names, tmp_path)
    extra = frame_differences.extra_files(names, tmp_path)
    assert list(files) == ["openvino-bf16"]
    assert list(extra) == ["openvino-int8-tiny", "diffusers-fp32"], "the baseline is drawn if it is not measured"
    assert frame_differences.extra_files(["diffusers-fp32"], tmp_path) == {}
    assert frame_differences.extra_files([], tmp_path) == {}, "nothing was measured"
    frames = np.full((2, 4, 4, 3), 250, np.uint8)
    np.save(files["openvino-bf16"], frames)
    assert frame_differences.levels(files | extra) == {}, "the baseline has no frames yet"
    frames[0, 0, 0] = 255
    np.save(extra["diffusers-fp32"], frames)
    assert frame_differences.levels(files | extra) == {"openvino-bf16": {"mean": 5 / 32, "max": 5}}


def test_the_table_has_a_row_for_each_contender(report: dict[str, Any]) -> None:
    lines = compare_report.markdown_table(report).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[4] == (
        "| openvino-bf16 | 20.0 (10.0 .. 30.0) | 10.0 (8.00 .. 12.0) | 5.50 / 11.00 | 3.00 / 6.00 "
        "| 4.00 | 10.0 | 5.00 | 2 (100%) | 7.0 | 0.25 (3) |"
    )
    assert lines[5].startswith("| openvino-fp32 | ended with code 1 |")
    assert "medians of 3 rounds" in compare_report.legend(report)


def test_pictures_are_small(report: dict[str, Any], tmp_path: Path) -> None:
    import plot

    samples = {kind: [{"total": 2.0, "denoise": 1.0}] for kind in ("first", "second_seed")}
    points = [{"axis": axis, "value": 4, "samples": samples} for axis in plot.AXES]
    report["scaling"] = {"contender": "openvino-bf16", "points": [*points, {"failed": "ended"}]}
    pictures = plot.draw(report, tmp_path / "run.json")
    assert [path.name for path in pictures] == ["run-stages.png", "run-roofline.png", "run-scaling.png"]
    for path in pictures:
        assert Image.open(path).size > (500, 200)
        assert path.stat().st_size < 150_000


def test_memory_is_expected_to_grow_with_the_size() -> None:
    sizes = [RequestSize(side, side, 16) for side in (256, 512)]
    small, large = (cpu_contenders.contender("diffusers-fp32", Path(), size, 2).memory_gb for size in sizes)
    assert small == 13.4
    assert large == pytest.approx(23.6, rel=0.02)  # as measured
    names = [item.name for item in cpu_contenders.contenders(reversed(cpu_contenders.NAMES), Path(), sizes[0], 2)]
    assert names == list(cpu_contenders.NAMES)


def test_points_of_scaling_differ_in_one_thing() -> None:
    import plot

    base = RequestSize(256, 256, 16)
    sizes = read_manifest(demo_bundle()).sizes
    points = scaling.points(base, sizes)
    assert {axis for axis, _, _ in points} == set(plot.AXES) == set(scaling.AXES)
    assert {axis for axis, _, _ in scaling.points(base, sizes, ["side"])} == {"side"}
    for axis, value, size in points:
        changed = {name for name, given in size.as_dict().items() if given != base.as_dict()[name]}
        assert changed <= ({"width", "height"} if axis == "side" else {axis})
        assert value == getattr(size, "width" if axis == "side" else axis)


def test_the_program_measures_one_contender(tmp_path: Path) -> None:
    shutil.copytree(demo_bundle(), tmp_path / "bundle")  # a copy, since engines are built in it
    (tmp_path / "export.json").write_text("{}")
    output = tmp_path / "run.json"
    size = ("--size", "64x64", "--frames", "2", "--steps", "1", "--rounds", "1")
    command = ["--cache", str(tmp_path), "--output", str(output), "--contender", "onnxruntime-fp32", *size]
    program = [sys.executable, str(BENCHMARKS / "compare.py"), *command]
    result = subprocess.run(program, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "| onnxruntime-fp32 |" in result.stdout
    report = json.loads(output.read_text())
    assert str(tmp_path) not in output.read_text(), "no path of this machine"
    ours = report["contenders"]["onnxruntime-fp32"]
    seconds = ours["samples"]["first"]["denoise"][0]
    assert ours["flops_per_s"]["denoise"] == pytest.approx(report["work"]["unet"]["flops"] / seconds)


@pytest.mark.parametrize("text", ["64", "100x64", "0x64", "64x64x16", "2112x64", "64x99999999"])
def test_a_size_that_no_contender_takes_is_refused(text: str) -> None:
    assert models.clip_size("512x288") == "512x288"
    with pytest.raises(ArgumentTypeError, match="is not WIDTHxHEIGHT in multiples of 8"):
        models.clip_size(text)


def test_a_cache_of_something_else_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    with pytest.raises(SystemExit, match="was not finished"):
        models.prepare(tmp_path, "full")
    (tmp_path / "export.json").write_text('{"architecture": "small"}')
    with pytest.raises(SystemExit, match="holds the small architecture"):
        models.prepare(tmp_path, "full")
    assert models.prepare(tmp_path, "small") == {"architecture": "small"}
