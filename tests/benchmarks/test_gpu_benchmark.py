"""The benchmark of the GPU backends, run as a program as far as it needs no GPU."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sparsectrl_lcm.runtime.errors import BackendError
from sparsectrl_lcm.runtime.gpu.device import probe

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def run(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(PROGRAM), *options], capture_output=True, text=True, check=False)


def dry_run(folder: Path, *options: str) -> dict[str, Any]:
    output = folder / "results" / "dry-run.json"
    result = run("--dry-run", "--steps", "1", "--requests", "6", "--output", str(output), *options)
    assert result.returncode == 0, result.stderr
    assert "| onnxruntime |" in result.stdout
    return dict(json.loads(output.read_text()))


@pytest.mark.slow
def test_a_dry_run_takes_all_samples_and_writes_them(tmp_path: Path) -> None:
    report = dry_run(tmp_path)
    assert report["size"] == "128x128x16"
    assert report["device"] is None
    assert {"numpy", "onnxruntime"} <= report["versions"].keys()
    (row,) = report["rows"]
    assert {kind: len(stages["wall"]) for kind, stages in row["samples"].items()} == {
        "second_seed": 6,
        "new_keyframes": 3,
    }
    for kind, stages in row["samples"].items():
        kept = {"control", "keyframes", "text"} & stages.keys()
        assert bool(kept) == (kind == "new_keyframes")  # conditioning is kept for the next seed
        assert {"denoise", "decode"} < stages.keys()
        assert min(stages["wall"]) <= row["p50"][kind]["wall"] <= row["p95"][kind]["wall"] <= max(stages["wall"])
        counted = sum(report["flops"][stage] for stage in report["flops"] if stage in stages)
        assert row["flops_per_s"][kind]["wall"] == pytest.approx(counted / row["p50"][kind]["wall"])


def test_a_contender_that_runs_out_of_time_gives_a_reason(tmp_path: Path) -> None:
    (row,) = dry_run(tmp_path, "--time-limit", "0.2")["rows"]
    assert row["reason"].startswith("ran out of time")
    (row,) = dry_run(tmp_path, "--time-limit", "0")["rows"]
    assert row["reason"].startswith("was not started")


def test_nothing_is_measured_without_a_gpu() -> None:
    try:
        probe()
    except BackendError:
        result = run()
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith("nothing is measured without an NVIDIA GPU: ")
        assert result.stderr.count("\n") == 1
    else:
        pytest.skip("there is a GPU")
