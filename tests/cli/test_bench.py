"""`sparsectrl-lcm bench` as a user runs it."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from test_cli import fails, run, run_here

SMALL = ("--size", "64x64", "--frames", 2, "--steps", 1)
BACKENDS = ["onnxruntime", *(["openvino"] if find_spec("openvino") else [])]


def test_backends_are_measured_in_turn_and_one_that_cannot_run_is_a_line(tmp_path: Path) -> None:
    chosen = [item for name in (*BACKENDS, "tensorrt") for item in ("--backend", name)]
    result = run("bench", *chosen, *SMALL, "--repeat", 2, "--json", "bench.json", cwd=tmp_path)
    assert result.returncode == 1, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("tensorrt: ")]
    assert "backend: " not in line
    for text in ("2 frames of 64x64", "new prompt", "next seed", "memory, GB", "medians of 2", *BACKENDS):
        assert text in result.stdout
    report = json.loads((tmp_path / "bench.json").read_text())
    assert report["request"] == {"width": 64, "height": 64, "frames": 2, "steps": 1, "guidance": 1.0}
    assert {"processor", "cores", "memory_gb"} <= report["machine"].keys()
    assert {"python", "numpy", "onnxruntime"} <= report["versions"].keys()
    assert report["commit"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", report["commit"])
    assert report["backends"].pop("tensorrt")["failed"]
    assert list(report["backends"]) == BACKENDS
    for row in report["backends"].values():
        assert row["failed"] is None
        assert row["loaded"]["precision"] in ("fp32", "bf16", "int8")
        first, second = row["samples"]["first"], row["samples"]["second_seed"]
        for samples in (first, second):
            assert {len(values) for values in samples.values()} == {2}
            assert {"denoise", "decode", "total"} <= samples.keys()
        assert {"text", "keyframes", "control"} <= first.keys()
        assert not {"text", "keyframes", "control"} & second.keys(), "the conditioning is reused"
        assert row["summary"]["first"]["total"]["min"] == min(first["total"])
        assert 5e7 < row["peak_bytes"] < 2e9


BAD = [
    (["--backend", "magic"], "--backend: 'magic' is unknown; allowed are .*onnxruntime"),
    (["--size", "100x64"], "width: 100 is not allowed; give a multiple of 8"),
    (["--precision", "fp64"], "none can run here with what the bundle has"),
    (["--threads", "0"], "--threads: 0 is not allowed; give a whole number from 1 on"),
    (["--json", "."], "--json: '.' is a folder; name a file in it"),
    (["--json", "nowhere/bench.json"], "--json: the folder of 'nowhere/bench.json' does not exist"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_is_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    fails(run_here("bench", *arguments, cwd=tmp_path), message)
