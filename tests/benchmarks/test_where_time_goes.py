"""The profile of a request on OpenVINO."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from sparsectrl_lcm.runtime.format.bundle import demo_bundle

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "where_time_goes.py"


@pytest.mark.slow
def test_counters_of_all_graphs_are_written(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    shutil.copytree(demo_bundle(), tmp_path / "bundle")  # engines are built in it
    (tmp_path / "export.json").write_text("{}")
    output = tmp_path / "run.json"
    size = ("--size", "64x64", "--frames", "2", "--steps", "1", "--precision", "fp32")
    program = [sys.executable, str(PROGRAM), "--cache", str(tmp_path), "--output", str(output), *size]
    result = subprocess.run(program, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "| unet, seconds | fp32 |" in result.stdout
    assert str(tmp_path) not in output.read_text(), "no path of this machine"
    found = json.loads(output.read_text())["precisions"]["fp32"]
    assert {"text_encoder", "controlnet_scribble", "unet", "vae_decoder"} <= found["graphs"].keys()
    unet = found["graphs"]["unet"]
    assert {"Convolution", "FullyConnected"} <= unet.keys()
    assert 0 < sum(unet.values()) <= found["seconds"]["denoise"]
