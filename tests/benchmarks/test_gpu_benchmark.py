"""The benchmark of the GPU backends, run as a program as far as it needs no GPU."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import gpu_worker
import torch
from gpu_contenders import Job, rows_of
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


EAGER = Job("measure", "diffusers-eager", "", None, 8, 8, 2, 1, requests=1)


def test_what_diffusers_measured_is_written_before_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def generate(_: Any, prompt: str, seed: int, *__: Any) -> None:
        asked.append(seed)

    def watch_stages(*_: Any) -> list[dict[str, float]]:
        raise RuntimeError("killed")

    monkeypatch.setattr(gpu_worker, "generate", generate)
    monkeypatch.setattr(gpu_worker, "watch_stages", watch_stages)
    rows = gpu_worker.sample_diffusers(EAGER, SimpleNamespace(), "cpu", 0.0, deadline=0.0)
    assert next(rows).keys() == {"mode", "load_s", "first_s"}
    assert asked == [0]
    assert {kind: len(taken["wall"]) for kind, taken in next(rows)["samples"].items()} == {
        "second_seed": 3,
        "new_keyframes": 3,
    }
    with pytest.raises(RuntimeError, match="killed"):
        next(rows)


def test_the_time_of_diffusers_includes_its_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 100))
    monkeypatch.setattr(gpu_worker.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(gpu_worker, "load_pipeline", lambda _: torch.nn.Identity())
    deadlines: list[float] = []

    def sample_diffusers(*arguments: Any) -> list[dict[str, Any]]:
        deadlines.append(arguments[-1])
        return []

    monkeypatch.setattr(gpu_worker, "sample_diffusers", sample_diffusers)
    list(gpu_worker.measure_diffusers(replace(EAGER, checkpoints="", seconds=10.0), "cpu", "float32"))
    assert deadlines == [8.5]


def test_the_last_of_several_rows_of_a_mode_counts() -> None:
    first = {"mode": None, "first_s": 1.0, "peak_bytes": 9}
    (row,) = rows_of(EAGER, {}, [first, {"reason": "ran out of time (9 s)", "peak_bytes": 1}])
    assert (row["reason"], row["first_s"]) == ("ran out of time (9 s)", 1.0)
    (row,) = rows_of(EAGER, {}, [first, first | {"samples": {}, "peak_bytes": 5}, {"reason": "late"}])
    assert (row["samples"], row["peak_bytes"]) == ({}, 9)
    assert "reason" not in row


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
