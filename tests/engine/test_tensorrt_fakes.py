"""The TensorRT fakes, compared with known differences between releases, and with TensorRT-RTX if it is installed."""

import ctypes
import importlib
import json
import operator
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.tensorrt_dump import rtx_libraries
from fakes.tensorrt_fakes import FakeModule, fake_tensorrt

VERSIONS = ("10.16", "11.4", "rtx-1.7")
ALL = set(VERSIONS)
NAMES = {
    "BuilderFlag.FP16": {"10.16"},
    "BuilderFlag.OBEY_PRECISION_CONSTRAINTS": {"10.16"},
    "BuilderFlag.REFIT": ALL,
    "BuilderFlag.REQUIRE_USER_ALLOCATION": {"rtx-1.7"},
    "BuilderFlag.STRIP_PLAN": ALL,
    "ComputeCapability": {"rtx-1.7"},
    "IBuilderConfig.int8_calibrator": {"10.16"},
    "IBuilderConfig.max_workspace_size": set(),
    "IBuilderConfig.progress_monitor": ALL,
    "ICudaEngine.device_memory_size": {"10.16"},
    "ICudaEngine.device_memory_size_v2": ALL,
    "IExecutionContext.execute_async_v2": set(),
    "IExecutionContext.execute_async_v3": ALL,
    "IRuntimeCache": {"rtx-1.7"},
    "NetworkDefinitionCreationFlag.EXPLICIT_BATCH": {"10.16"},
    "NetworkDefinitionCreationFlag.STRONGLY_TYPED": ALL,
    "OnnxParser.supports_model": {"10.16"},
    "float16": ALL,
}
# Run on a fake and on the real module; both have to give the same outcome.
STATEMENTS = (
    "list(trt.BuilderFlag)",
    "1 << trt.BuilderFlag.REFIT",
    "assert 1 << int(trt.BuilderFlag.REFIT) == 16",
    "assert trt.BuilderFlag.REFIT != 4",
    "assert trt.BuilderFlag(4) == trt.BuilderFlag.REFIT",
    "trt.BuilderFlag.FP32",
    "trt.BuilderFlag.REFIT.value = 3",
    "trt.MemoryPoolType.WORKSPACE < trt.BuilderFlag.REFIT",
    "config.set_flag(trt.BuilderFlag.REFIT)",
    "config.set_flag(flag=trt.BuilderFlag.REFIT)",
    "config.set_flag(4)",
    "config.set_flag(None)",
    "config.set_flag(trt.MemoryPoolType.WORKSPACE)",
    "config.set_flag()",
    "config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 1 << 30)",
    "config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 1e9)",
    "config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, size=1)",
    "config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 1, 1)",
    "config.create_timing_cache(b'')",
    "config.create_timing_cache('')",
    "config.builder_optimization_level = 3",
    "config.builder_optimization_level = 3.0",
    "config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED\n"
    "assert config.profiling_verbosity == trt.ProfilingVerbosity.DETAILED",
    "config.profiling_verbosity = 2",
    "config.plugins_to_serialize = [1]",
    "config.progress_monitor = None",
    "config.num_optimization_profiles = 1",
    "config.set_flag = None",
    "config.workspace = 1",
    "network.name = 'network'",
    "network.name = pathlib.Path('network')",
    "network.add_input('x', trt.float32, (1, -1))",
    "network.add_input('x', trt.float32, [1.5])",
    "network.add_constant((1,), numpy.zeros(1, numpy.float32))",
    "network.add_constant((1,), [0.0])",
    "for layer in builder.create_network(0): pass",
    "with trt.Runtime(logger) as runtime: runtime.max_threads = 2",
    "trt.IBuilderConfig()",
    "trt.Builder(None)",
    "trt.Builder()",
    "trt.OnnxParser(config, logger)",
    "trt.OnnxParser(network, logger).parse_from_file(pathlib.Path('model.onnx'))",
    "logger.log(trt.Logger.VERBOSE, 'text')",
    "logger.log(4, 'text')",
    "logger.level = 1",
    "class Monitor(trt.IProgressMonitor):\n  def __init__(self): super().__init__(); self.seen = []\nMonitor()",
    "class Monitor(trt.IProgressMonitor):\n  def __init__(self): self.seen = []\nMonitor()",
)


@pytest.fixture(params=VERSIONS)
def trt(request: pytest.FixtureRequest) -> FakeModule:
    return fake(request.param)


def fake(version: str) -> FakeModule:
    try:
        return fake_tensorrt(version)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


def outcomes(trt: Any) -> dict[str, str]:
    """Returns the name of the exception that each statement raises, or an empty string."""
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    found = {}
    for statement in STATEMENTS:
        config, network = builder.create_builder_config(), builder.create_network(0)
        scope = {"trt": trt, "numpy": np} | {"logger": logger, "builder": builder, "config": config, "network": network}
        try:
            exec(f"import pathlib\n{statement}", scope)
            found[statement] = ""
        except Exception as error:
            found[statement] = type(error).__name__
    return found


def real_outcomes(libraries: list[str]) -> dict[str, str]:
    for library in libraries:
        ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
    return outcomes(importlib.import_module("tensorrt_rtx_bindings"))


def test_a_fake_takes_and_refuses_what_tensorrt_rtx_does() -> None:
    expected = fake("rtx-1.7")
    try:
        libraries = rtx_libraries()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    code = "import json, sys, test_tensorrt_fakes as t; print(json.dumps(t.real_outcomes(sys.argv[1:])))"
    folders = os.pathsep.join(str(folder) for folder in (Path(__file__).parent, Path(__file__).parent.parent))
    done = subprocess.run(
        [sys.executable, "-c", code, *libraries],
        env=os.environ | {"PYTHONPATH": folders},
        capture_output=True,
        check=True,
    )
    assert outcomes(expected) == json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", NAMES)
def test_names_are_those_of_the_release(version: str, name: str) -> None:
    trt = fake(version)
    if version in NAMES[name]:
        operator.attrgetter(name)(trt)
    else:
        with pytest.raises(AttributeError, match=f"TensorRT {version} has no {name}"):
            operator.attrgetter(name)(trt)


def test_an_instance_has_the_attributes_of_its_class(trt: FakeModule) -> None:
    engine = trt.new("ICudaEngine", num_io_tensors=3, name="unet")
    assert (engine.num_io_tensors, engine.name) == (3, "unet")
    with pytest.raises(AttributeError, match=r"ICudaEngine.num_bindings"):
        engine.num_bindings  # noqa: B018
    with pytest.raises(AttributeError, match="no setter"):
        engine.num_io_tensors = 4
    with pytest.raises(AttributeError, match="num_bindings"):
        trt.new("ICudaEngine", num_bindings=1)
    context = trt.new("IExecutionContext")
    context.device_memory = 4096
    with pytest.raises(AttributeError, match="device_memory"):
        context.device_memory  # noqa: B018


def test_a_fake_can_be_imported(trt: FakeModule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, trt.__name__, trt)
    assert importlib.import_module(trt.__name__) is trt


def test_constants_and_attributes_keep_their_values(trt: FakeModule) -> None:
    assert trt.float16 is trt.DataType.HALF
    assert trt.float16.itemsize == 2
    assert trt.Logger.WARNING is trt.ILogger.Severity.WARNING
    assert trt.Dims.MAX_DIMS == 8


def test_values_of_flags_differ_between_releases() -> None:
    old, new = fake_tensorrt("10.16"), fake_tensorrt("11.4")
    assert (int(old.BuilderFlag.STRIP_PLAN), int(new.BuilderFlag.STRIP_PLAN)) == (19, 18)
    assert old.BuilderFlag.STRIP_PLAN == old.BuilderFlag.WEIGHTLESS
    assert old.BuilderFlag.REFIT != new.BuilderFlag.REFIT


def test_what_is_done_is_recorded_in_order(trt: FakeModule) -> None:
    logger = trt.Logger(trt.Logger.INFO)
    config = trt.Builder(logger).create_builder_config()
    config.max_aux_streams = 0
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, pool_size=1)
    config.__class__.set_flag(config, trt.BuilderFlag.REFIT)
    assert config.max_aux_streams == 0
    assert trt.calls == [
        ("Logger", (trt.Logger.INFO,), {}),
        ("Builder", (logger,), {}),
        ("Builder.create_builder_config", (), {}),
        ("IBuilderConfig.max_aux_streams=", (0,), {}),
        ("IBuilderConfig.set_memory_pool_limit", (trt.MemoryPoolType.WORKSPACE,), {"pool_size": 1}),
        ("IBuilderConfig.set_flag", (trt.BuilderFlag.REFIT,), {}),
    ]


def test_refused_calls_are_not_recorded(trt: FakeModule) -> None:
    with pytest.raises(TypeError, match=r"takes \(flag: BuilderFlag\), not \(0\)"):
        trt.new("IBuilderConfig").set_flag(0)
    assert trt.calls == []


def test_answers_replace_the_defaults(trt: FakeModule) -> None:
    engine = trt.new("ICudaEngine")
    assert engine.get_tensor_name(0) == ""
    trt.answers["ICudaEngine.get_tensor_name"] = lambda _engine, index: ("sample", "timestep")[index]
    trt.answers["ICudaEngine.num_io_tensors"] = lambda _engine: 2
    trt.answers["nptype"] = lambda dtype: {trt.float16: np.float16}[dtype]
    assert [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)] == ["sample", "timestep"]
    assert trt.nptype(trt.float16) is np.float16
    assert trt.calls[-1] == ("nptype", (trt.float16,), {})


def test_defaults_are_of_the_annotated_types(trt: FakeModule) -> None:
    engine, refitter = trt.new("ICudaEngine"), trt.new("Refitter")
    assert isinstance(engine.create_execution_context(), trt.IExecutionContext)
    assert isinstance(engine.get_tensor_dtype("sample"), trt.DataType)
    assert tuple(engine.get_tensor_shape("sample")) == ()
    assert refitter.get_all() == ([], [])
    assert refitter.refit_cuda_engine() is True
    assert trt.new("IBuilderConfig").set_flag(trt.BuilderFlag.REFIT) is None
    assert isinstance(trt.new("OnnxParser").get_error(0), trt.ParserError)


def test_bases_lend_their_methods_and_properties(trt: FakeModule) -> None:
    layer = trt.new("IConstantLayer", name="weights")
    assert isinstance(layer, trt.ILayer)
    assert layer.name == "weights"
    layer.set_input(0, trt.new("ITensor"))
    assert trt.calls[0][0] == "ILayer.set_input"
    trt.answers["ILayer.num_inputs"] = lambda _layer: 1
    trt.answers["IConstantLayer.num_inputs"] = lambda _layer: 0
    assert (layer.num_inputs, trt.new("ISliceLayer").num_inputs) == (0, 1)


def test_overloads_are_tried_in_turn(trt: FakeModule) -> None:
    trt.Weights(np.zeros(2, np.float16))
    trt.Weights(trt.float16, 4096, 2)
    with pytest.raises(TypeError, match="Weights takes"):
        trt.Weights(trt.float16, 4096)
    engine = trt.new("ICudaEngine")
    engine.create_execution_context(strategy=trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    engine.create_execution_context(engine.create_runtime_config())
    with pytest.raises(TypeError, match="create_execution_context takes"):
        engine.create_execution_context(trt.ProfilingVerbosity.DETAILED)


def test_an_interface_is_derived_from(trt: FakeModule) -> None:
    class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.phases: list[str] = []

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.phases.append(phase_name)

    config, monitor = trt.new("IBuilderConfig"), Monitor()
    config.progress_monitor = monitor
    config.progress_monitor.phase_start("Build", None, 3)
    assert monitor.phases == ["Build"]
    assert monitor.step_complete("Build", 1) is True
    assert [name for name, _, _ in trt.calls] == [
        "IProgressMonitor",
        "IBuilderConfig.progress_monitor=",
        "IProgressMonitor.step_complete",
    ]


def test_an_override_that_would_never_be_called_is_refused(trt: FakeModule) -> None:
    with pytest.raises(TypeError, match="phase_begin"):
        type("Monitor", (trt.IProgressMonitor,), {"phase_begin": lambda self, phase_name: None})
    with pytest.raises(TypeError, match="phase_finish with self and 1 arguments"):
        type("Monitor", (trt.IProgressMonitor,), {"phase_finish": lambda self: None})


def test_overrides_that_are_only_documented_are_known(trt: FakeModule) -> None:
    """`IOutputAllocator` binds no methods; `IStreamWriter.write` is called with fewer arguments than it binds."""
    type("Allocator", (trt.IOutputAllocator,), {"notify_shape": lambda self, tensor_name, shape: None})
    type("Writer", (trt.IStreamWriter,), {"write": lambda self, data: len(data)})
    with pytest.raises(TypeError, match="reallocate_output_async"):
        type("Allocator", (trt.IOutputAllocator,), {"reallocate_output_async": lambda self, tensor_name: 0})
