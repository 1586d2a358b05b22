"""Machines with a GPU that a backend cannot use: the reason is known before anything is loaded."""

import shutil
import subprocess
import sys
from importlib.metadata import version as installed_version
from pathlib import Path

import onnxruntime
import pytest
from fakes.tensorrt_builds import Workshop
from sparsectrl_lcm.cli import run
from sparsectrl_lcm.runtime import BackendError, backends
from sparsectrl_lcm.runtime.format.bundle import Bundle
from sparsectrl_lcm.runtime.gpu import device
from sparsectrl_lcm.runtime.gpu import onnxruntime as onnxruntime_cuda
from sparsectrl_lcm.runtime.gpu.device import Device
from sparsectrl_lcm.runtime.gpu.tensorrt import usable_device
from sparsectrl_lcm.runtime.load_options import LoadOptions


@pytest.mark.parametrize(
    ("capability", "refused"), [("8.9", False), ("9.0", True), ("12.0", False), ("10.0", True), ("8.0", False)]
)
def test_tensorrt_rtx_runs_on_the_gpus_that_its_library_lists(
    capability: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Device("NVIDIA X", capability, 150 << 30, "580.95.05")
    monkeypatch.setattr(device, "probe", lambda api=None: found)
    reason = backends.availability("tensorrt-rtx").reason
    version = installed_version("tensorrt-rtx-cu13-bindings")
    expected = (
        f"tensorrt-rtx {version} runs on GPUs of compute capability 7.5, 8.0, 8.6, 8.9, 12.0, 12.1, not on {found}; "
        "take another backend"
    )
    assert reason == (expected if refused else None)
    if refused:
        with pytest.raises(BackendError, match="runs on GPUs of compute capability"):
            backends.open_executor(Bundle.load(), "tensorrt-rtx", LoadOptions())


@pytest.mark.parametrize("release", ["11.4", "rtx-1.7"])
def test_only_tensorrt_rtx_has_a_list_of_gpus(release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    library = Workshop(release).library
    gpu = Device("NVIDIA X", "6.1", 8 << 30, "580.95.05")
    monkeypatch.setattr(device, "probe", lambda api=None: gpu)
    if library.is_rtx:
        with pytest.raises(BackendError, match=r"8\.9, 12\.0, 12\.1, not on NVIDIA X \(compute capability 6\.1\)"):
            usable_device(library)
    else:
        assert usable_device(library) is gpu


def test_doctor_says_that_tensorrt_rtx_does_not_know_a_gpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "probe", lambda api=None: Device("NVIDIA H200", "9.0", 150 << 30, "580.95.05"))
    assert run(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "not on NVIDIA H200 (compute capability 9.0); take another backend" in text
    assert "tensorrt-rtx: engines can be built here nevertheless" in text


@pytest.fixture
def gpu_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with a GPU and onnxruntime-gpu, whose provider library a test may make."""
    monkeypatch.setattr(device, "probe", lambda api=None: Device("NVIDIA H200", "9.0", 150 << 30, "580.95.05"))
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: print("Failed to load libcublas"))
    monkeypatch.setattr(onnxruntime, "__file__", str(tmp_path / "__init__.py"))
    (tmp_path / "capi").mkdir()
    return tmp_path / "capi"


def compile_library(path: Path, *needed: Path) -> None:
    """Makes an empty shared library that needs others; skips the test if this system has no compiler for it."""
    compiler = shutil.which("cc") if sys.platform == "linux" else None
    if compiler is None:
        pytest.skip("needs Linux and a C compiler")
    named = ["-shared", "-x", "c", "/dev/null", f"-Wl,-soname,{path.name}", "-o", str(path)]
    others = ["-x", "none", "-Wl,--no-as-needed", *map(str, needed)]
    subprocess.run([compiler, *named, *others], check=True)


def test_a_library_that_the_cuda_provider_needs_is_named(
    gpu_package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The provider is listed as available nevertheless, and a session would compute on the CPU."""
    needed = tmp_path / "libcurand-of-the-test.so.10"
    compile_library(needed)
    compile_library(gpu_package / "libonnxruntime_providers_cuda.so", needed)
    needed.unlink()
    found = backends.availability("onnxruntime-cuda")
    assert found.version == onnxruntime.__version__
    sentence = "libcurand-of-the-test.so.10: cannot open shared object file: No such file or directory"
    assert str(found.reason).startswith(f"ONNX Runtime's CUDA provider cannot be loaded: {sentence}; run: pip ")
    assert run(["doctor"]) == 0
    streams = capsys.readouterr()
    assert f"onnxruntime-cuda: ONNX Runtime's CUDA provider cannot be loaded: {sentence}" in streams.out
    assert "Failed to load" not in streams.out + streams.err, "the loader's sentence is enough"
    with pytest.raises(BackendError, match="cannot be loaded: libcurand-of-the-test"):
        backends.open_executor(Bundle.load(), "onnxruntime-cuda", LoadOptions())


def test_a_refusal_of_the_provider_itself_is_passed_on(gpu_package: Path) -> None:
    compile_library(gpu_package / "libonnxruntime_providers_cuda.so")
    reason = str(backends.availability("onnxruntime-cuda").reason)
    assert reason.startswith("ONNX Runtime's CUDA provider cannot be loaded: Can't allocate memory on the CUDA device")


@pytest.mark.usefixtures("gpu_package")
def test_cudnn_is_missed_before_the_first_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_shape_and_type", lambda *_: None)
    monkeypatch.setattr(onnxruntime_cuda, "CUDNN", "cudnn-of-the-test")
    reason = str(backends.availability("onnxruntime-cuda").reason)
    assert reason.startswith("ONNX Runtime's CUDA provider cannot be loaded: ")
    assert "cudnn-of-the-test" in reason
    monkeypatch.setattr(onnxruntime_cuda, "loading_error", lambda library: None)
    assert backends.availability("onnxruntime-cuda").reason is None
