"""The backend that `auto` takes, by what can run and which engines there are."""

import logging
import shutil
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
from sparsectrl_lcm.engine.engine_writer import any_size_spec, engine_record
from sparsectrl_lcm.runtime import BackendError, VideoPipeline, backends
from sparsectrl_lcm.runtime.backend_interface import Availability
from sparsectrl_lcm.runtime.cpu.openvino import version as openvino_version
from sparsectrl_lcm.runtime.format.bundle import Bundle, demo_bundle
from sparsectrl_lcm.runtime.format.engine_keys import EngineIndex
from sparsectrl_lcm.runtime.format.engine_sets import find_set, set_name, write_index
from sparsectrl_lcm.runtime.gpu import device
from sparsectrl_lcm.runtime.gpu import onnxruntime as onnxruntime_cuda
from sparsectrl_lcm.runtime.gpu.device import Device
from sparsectrl_lcm.runtime.load_options import LoadOptions
from sparsectrl_lcm.service.runner import pipeline_loading as loading


def test_auto_takes_openvino_on_a_cpu_that_has_it() -> None:
    assert VideoPipeline.load().backend == "openvino"


@pytest.fixture(scope="module")
def with_engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo bundle with engines for onnxruntime-cuda."""
    bundle = Path(shutil.copytree(demo_bundle(), tmp_path_factory.mktemp("built") / "bundle"))
    write_set(bundle, "onnxruntime-cuda", "fp16", onnxruntime.__version__)
    return bundle


def test_auto_takes_the_fastest_that_can_run_and_has_engines(
    with_engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = Path(shutil.copytree(with_engines, tmp_path / "bundle"))
    opened = Bundle.load(bundle)
    version = onnxruntime.__version__
    monkeypatch.setattr(device, "probe", lambda api=None: Device("NVIDIA H200", "9.0", 150 << 30, "580.95.05"))
    monkeypatch.setattr(backends, "availability", lambda name: Availability(name, version))
    assert backends.choose_backend(opened) == "onnxruntime-cuda"
    monkeypatch.setattr(backends, "availability", lambda name: Availability(name, "9.9"))
    with caplog.at_level(logging.WARNING):
        assert backends.choose_backend(opened) == "openvino", "engines for another version are skipped"
    assert f"run: sparsectrl-lcm build {bundle} --backend onnxruntime-cuda" in caplog.text
    monkeypatch.setattr(backends, "availability", lambda name: Availability(name, None, "is not there"))
    assert backends.choose_backend(opened) == "onnxruntime"


def test_auto_passes_over_tensorrt_rtx_on_a_gpu_that_it_does_not_know(
    with_engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Path(shutil.copytree(with_engines, tmp_path / "bundle"))
    write_set(bundle, "tensorrt-rtx", "fp16", installed_version("tensorrt-rtx-cu13-bindings"))
    monkeypatch.setattr(onnxruntime_cuda, "find_version", lambda name: onnxruntime.__version__)
    monkeypatch.setattr(onnxruntime_cuda, "check_machine", lambda name: None)
    for capability, chosen in (("12.0", "tensorrt-rtx"), ("9.0", "onnxruntime-cuda")):
        found = Device("NVIDIA X", capability, 150 << 30, "580.95.05")
        monkeypatch.setattr(device, "probe", lambda api=None, found=found: found)
        assert backends.choose_backend(Bundle.load(bundle)) == chosen


def test_auto_takes_what_the_options_are_for(with_engines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Bundle.load(with_engines)
    monkeypatch.setattr(device, "probe", lambda api=None: Device("NVIDIA H200", "9.0", 150 << 30, "580.95.05"))
    monkeypatch.setattr(backends, "availability", lambda name: Availability(name, onnxruntime.__version__))

    def chosen(**options: Any) -> str:
        return backends.choose_backend(opened, LoadOptions(**options))

    assert chosen() == chosen(precision="fp16") == "onnxruntime-cuda"
    assert chosen(precision="fp32") == chosen(device="CPU") == "openvino"
    assert chosen(precision="int8") == "openvino", "its error has the build command"
    with pytest.raises(BackendError, match="threads: only for openvino, .* for onnxruntime-cuda"):
        VideoPipeline.load(with_engines, threads=2)
    with pytest.raises(BackendError, match="int8 engines were not built; run: .* --backend openvino --precision int8"):
        loading.load(str(with_engines), precision="int8")


def test_auto_asks_about_the_engines_that_openvino_would_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = Path(shutil.copytree(demo_bundle(), tmp_path / "bundle"))
    for precision, built_by in (("fp32", "2020.1"), ("int8", openvino_version())):
        write_set(bundle, "openvino", precision, built_by)
    opened = Bundle.load(bundle)
    assert backends.choose_backend(opened) == "onnxruntime"
    assert f"run: sparsectrl-lcm build {bundle} --backend openvino" in caplog.text
    assert backends.choose_backend(opened, LoadOptions(precision="int8")) == "openvino"


def write_set(bundle: Path, backend: str, precision: str, version: str, flags: dict[str, Any] | None = None) -> None:
    """A set with one engine that was never built."""
    index = EngineIndex(backend=backend, precision=precision, engines={})
    spec = any_size_spec(Bundle.load(bundle), "unet", backend, precision, version)
    folder = bundle / "engines" / backend / set_name(precision)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "unet.onnx").write_bytes(b"")
    spec = spec.model_copy(update={"flags": flags or {}})
    index.engines["unet"] = engine_record(folder / "unet.onnx", spec, {})
    write_index(folder, index)


def test_a_set_that_would_not_be_chosen_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without BF16 in the processor, OpenVINO runs the portable graphs of a bundle that has bf16 engines alone."""
    monkeypatch.setattr("sparsectrl_lcm.runtime.cpu.openvino.best_precision", lambda: "fp32")
    bundle = Path(shutil.copytree(demo_bundle(), tmp_path / "bundle"))
    write_set(bundle, "openvino", "bf16", openvino_version())
    opened = Bundle.load(bundle)
    assert backends.choose_backend(opened) == "openvino"
    assert VideoPipeline.load(bundle).precision == "fp32"
    assert caplog.text == ""


def test_a_command_is_given_for_an_index_with_strange_flags(tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(demo_bundle(), tmp_path / "bundle"))
    write_set(bundle, "openvino", "fp32", "1", {"optimization_level": 9, "workspace": "big", "unknown": 1})
    engines = find_set(bundle, "openvino", "fp32")
    assert engines is not None
    with pytest.raises(BackendError, match="was built by version 1") as error:
        engines.open(Bundle.load(bundle).manifest, "unet", "2")
    assert error.value.remedy.endswith("--backend openvino --precision fp32 --optimization-level 9 --workspace big")
