"""`doctor` lists what can run on this machine, and the fix for the rest."""

import re
import sys
from types import SimpleNamespace

import onnxruntime
import pytest
from sparsectrl_lcm.cli import run
from sparsectrl_lcm.runtime import backends, machine
from sparsectrl_lcm.runtime.cpu.openvino import version as openvino_version
from sparsectrl_lcm.runtime.gpu import device
from sparsectrl_lcm.runtime.gpu.device import Device

NO_DRIVER = SimpleNamespace(cudaDriverGetVersion=lambda: (0, 0))


def test_doctor_says_what_can_run_and_what_mends_the_rest(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setattr(device, "runtime_api", lambda: NO_DRIVER)
    assert run(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "GPU: no NVIDIA driver was found" in text
    rows = {line.split("│")[1].strip(): line for line in text.splitlines() if "│" in line}
    assert set(rows) == set(backends.BACKENDS)
    for name, version in (("onnxruntime", onnxruntime.__version__), ("openvino", openvino_version())):
        assert " yes " in rows[name]
        assert version in rows[name]
    said = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
    assert "run: pip install 'tensorrt>=10.16,<12' cuda-bindings onnx-ir" in said["tensorrt"]
    assert "onnxruntime-gpu[cuda,cudnn]>=1.31" in said["onnxruntime-cuda"]
    assert said["tensorrt-rtx"] == "engines can be built here nevertheless"
    openvino = said["openvino"].removesuffix("; int8 is no faster than fp32 without VNNI or AMX")
    assert re.fullmatch(r"the processor computes in (\w+\d, )*FP32(, \w+\d)*; build takes (bf16|fp32)", openvino)
    assert "takes the first of openvino, onnxruntime that has engines" in text
    assert "; generate leaves out openvino if compiling takes longer than it saves\n" in text


@pytest.mark.parametrize(("flags", "slow"), [("fpu avx2", True), ("fpu avx2 avx_vnni", False), ("", False)])
def test_doctor_says_where_int8_does_not_pay(
    flags: str, slow: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "cpu_fields", lambda name: [flags] if name == "flags" else [])
    assert run(["doctor"]) == 0
    assert ("; int8 is no faster than fp32 without VNNI or AMX\n" in capsys.readouterr().out) is slow


def test_doctor_says_what_installs_openvino(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert run(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "openvino: OpenVINO is not installed; run: pip install 'sparsectrl-lcm[openvino]'" in text
    assert text.endswith("\n--backend auto takes onnxruntime\n")


def test_doctor_describes_the_device(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = Device("NVIDIA H200", "9.0", 150 << 30, "580.95.05")
    monkeypatch.setattr(device, "probe", lambda api=None: found)
    assert run(["doctor"]) == 0
    assert "GPU: NVIDIA H200 (compute capability 9.0), 150 GiB, driver 580.95.05" in capsys.readouterr().out


def test_its_table_is_whole_in_a_pipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "20")  # of no meaning in a pipe
    assert run(["doctor"]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│ onnxruntime ")]
    assert row.strip("│").split("│")[1].strip() == onnxruntime.__version__
