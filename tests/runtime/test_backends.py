"""The choice of a backend, and the errors on a machine that cannot run it."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from sparsectrl_lcm.cli import run
from sparsectrl_lcm.runtime import BackendError, InvalidRequest, SparseCtrlLcmError, VideoPipeline, backends
from sparsectrl_lcm.runtime.format.build_options import BuildOptions
from sparsectrl_lcm.runtime.format.bundle import Bundle, demo_bundle
from sparsectrl_lcm.runtime.gpu import cuda, device
from sparsectrl_lcm.runtime.gpu import tensorrt_library as library
from sparsectrl_lcm.runtime.gpu.device import probe
from sparsectrl_lcm.runtime.load_options import LoadOptions

NO_DRIVER = SimpleNamespace(cudaDriverGetVersion=lambda: (0, 0))


def cudart(count: int = 1, status: int = 0, name: Any = b"NVIDIA H200\0\0") -> SimpleNamespace:
    properties = SimpleNamespace(name=name, major=9, minor=0, totalGlobalMem=150_000_000_000)
    return SimpleNamespace(
        cudaDriverGetVersion=lambda: (0, 13_000),
        cudaGetDeviceCount=lambda: (Status(status), count),
        cudaGetDeviceProperties=lambda index: (0, properties),
    )


class Status(int):
    name = "cudaErrorInsufficientDriver"


@pytest.fixture
def no_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which OpenVINO is not installed."""
    monkeypatch.setitem(sys.modules, "openvino", None)


@pytest.mark.parametrize("name", ["auto", "onnxruntime"])
@pytest.mark.usefixtures("no_openvino")
def test_the_cpu_runs_everywhere(name: str) -> None:
    assert VideoPipeline.load(backend=name).backend == "onnxruntime"


@pytest.mark.parametrize("threads", [1, None])
def test_threads_reach_onnxruntime(threads: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = shutil.copytree(demo_bundle(), tmp_path / "bundle")  # the tests share sessions of the demo bundle itself
    received = []

    def open_session(path: bytes, options: onnxruntime.SessionOptions, **rest: Any) -> onnxruntime.InferenceSession:
        received.append(options.intra_op_num_threads)
        return session(path, options, **rest)

    session = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", open_session)
    sessions = VideoPipeline.load(bundle, "onnxruntime", threads=threads).executor.sessions  # type: ignore[attr-defined]
    sessions.open("lcm_update", {})
    assert received == [threads or 0]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("tensorrt", "tensorrt is not installed; run: pip install 'tensorrt"),
        ("tensorrt-rtx", "no NVIDIA driver was found"),
        ("onnxruntime-cuda", "onnxruntime-gpu is not installed; run: pip uninstall --yes onnxruntime && pip install"),
        ("openvino", "OpenVINO is not installed; run: pip install 'sparsectrl-lcm[openvino]'"),
        (
            "magic",
            "'magic' is unknown; allowed are auto, tensorrt, tensorrt-rtx, onnxruntime-cuda, openvino, onnxruntime",
        ),
    ],
)
@pytest.mark.usefixtures("no_openvino")
def test_a_backend_that_cannot_run_is_refused_in_one_line(
    name: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "runtime_api", lambda: NO_DRIVER)
    with pytest.raises(BackendError) as error:
        VideoPipeline.load(backend=name)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_the_device_is_described() -> None:
    found = probe(cudart())
    assert str(found) == "NVIDIA H200 (compute capability 9.0)"
    assert found.memory == 150_000_000_000
    assert found.driver


@pytest.mark.parametrize(
    ("api", "reason"),
    [
        (NO_DRIVER, "no NVIDIA driver was found"),
        (cudart(count=0), "no NVIDIA GPU was found"),
        (cudart(status=35), r"the NVIDIA driver does not work here: cudaErrorInsufficientDriver \(35\)"),
    ],
)
def test_what_a_device_lacks_is_said(api: Any, reason: str) -> None:
    with pytest.raises(BackendError, match=reason):
        probe(api)


@pytest.mark.parametrize(
    ("driver", "reason"),
    [(True, "cuda-bindings is missing; run: pip install cuda-bindings"), (False, "no NVIDIA driver was found")],
)
def test_missing_bindings_are_named_where_a_driver_wants_them(
    driver: bool, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    monkeypatch.setattr(cuda, "has_driver", lambda: driver)
    with pytest.raises(BackendError, match=reason):
        probe()


def test_a_library_that_cannot_be_loaded_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ImportError("libnvinfer.so.11: cannot open shared object file")

    monkeypatch.setattr(library, "find_spec", lambda name: True)
    monkeypatch.setattr(library.importlib, "import_module", fail)
    with pytest.raises(BackendError, match=r"tensorrt cannot be loaded: libnvinfer\.so\.11"):
        library.load_library.__wrapped__("tensorrt")


def test_a_cpu_build_in_the_place_of_the_gpu_build_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsectrl_lcm.runtime.cpu.onnxruntime.is_installed", lambda name: True)
    assert "has overwritten onnxruntime-gpu" in str(backends.availability("onnxruntime-cuda").reason)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 0}, "threads: 0 is not allowed; give a whole number from 1 on"),
        ({"threads": "2"}, "threads: '2'"),
        ({"threads": 1.5}, "threads: 1.5"),
        ({"threads": np.int64(0)}, "threads: "),
        ({"kept_bytes": None}, "kept_bytes: None is not allowed; give a whole number from 0 on"),
        ({"kept_bytes": -1}, "kept_bytes: -1"),
    ],
)
def test_options_that_are_no_number_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        VideoPipeline.load(**options)


@pytest.mark.parametrize("module", ["runtime.backends", "engine.check", "export.check"])
def test_onnxruntime_does_not_report_its_use(module: str, tmp_path: Path) -> None:
    """It would write its reports to the user's cache folder before it sends them."""
    code = f"import sparsectrl_lcm.{module}, onnxruntime"
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "ORT_DISABLE_TELEMETRY")}
    environment["XDG_CACHE_HOME"] = environment["HOME"] = str(tmp_path)
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert list(tmp_path.rglob("*onnxruntime*")) == []


@pytest.mark.usefixtures("no_openvino")
def test_files_that_two_packages_share_and_one_removed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.delattr(onnxruntime, "get_available_providers")
    mend = "onnxruntime is broken; run: pip install --force-reinstall --no-deps onnxruntime"
    for backend in ("onnxruntime", "onnxruntime-cuda"):
        assert mend in str(backends.availability(backend).reason)
    command = ["generate", "--prompt", "a boat", "-o", str(tmp_path / "x.mp4")]
    for arguments in (command, ["build", str(demo_bundle()), "--backend", "onnxruntime"]):
        assert run(arguments) == 2
        assert mend in capsys.readouterr().err
    assert run(["doctor"]) == 0
    assert "None" not in capsys.readouterr().out


@pytest.mark.usefixtures("no_openvino")
def test_a_missing_onnxruntime_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "run: pip uninstall --yes onnxruntime" in str(backends.availability("onnxruntime-cuda").reason)
    for command in (
        ["generate", "--prompt", "a boat", "-o", str(tmp_path / "x.mp4")],
        ["build", str(demo_bundle()), "--backend", "onnxruntime"],
    ):
        assert run(command) == 2
        assert re.search(
            r"onnxruntime cannot be loaded \(.*\); run: pip install onnxruntime\n$", capsys.readouterr().err
        )
    assert run(["doctor"]) == 0


def test_no_tensorrt_object_is_made_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some versions crash in the constructor of their runtime if there is no driver."""
    fake = SimpleNamespace(backend="tensorrt", version="11.4", module=None, logger=None)
    monkeypatch.setattr(library, "load_library", lambda backend: fake)
    monkeypatch.setattr(device, "runtime_api", lambda: NO_DRIVER)
    with pytest.raises(BackendError, match="no NVIDIA driver"):
        backends.open_executor(Bundle.load(), "tensorrt", LoadOptions())


def test_a_precision_that_no_cpu_has_is_named_with_its_backends() -> None:
    with pytest.raises(BackendError, match="'fp16' is for tensorrt, tensorrt-rtx, onnxruntime-cuda$"):
        VideoPipeline.load(precision="fp16")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "onnxruntime", "cuda_graphs": False}, "cuda_graphs: only for tensorrt, tensorrt-rtx, .*"),
        ({"cuda_graphs": "no"}, "cuda_graphs: 'no' is not allowed; give True or False"),
    ],
)
def test_cuda_graphs_are_an_option_of_gpus(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SparseCtrlLcmError, match=message):
        VideoPipeline.load(**options)


def test_a_build_is_refused_before_the_bundle_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["build", "nothing", "--backend", "tensorrt", "--optimization-level", "9"]) == 2
    assert capsys.readouterr().err == "error: --optimization-level: 9 is out of range; allowed are 0 to 5\n"
    assert run(["build", "nothing", "--backend", "openvino", "--refit"]) == 2
    assert capsys.readouterr().err == "error: --refit: not an option of openvino\n"


def test_the_command_line_has_the_defaults_of_a_build() -> None:
    from inspect import signature

    from sparsectrl_lcm.cli.build import build as command

    defaults = {name: item.default for name, item in signature(command).parameters.items()}
    for item in fields(BuildOptions):
        if item.name in defaults:
            assert defaults[item.name] == item.default, item.name


@pytest.mark.parametrize("command", ["build", "generate"])
def test_help_names_every_backend(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([command, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for name in backends.BACKENDS:
        assert name in text
