"""Engines against the portable graphs: recorded requests, faults that are put into engines, judging saved results."""

import json
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.gpu_emulation import PortableGraphs, emulate
from faulty_engines import SIZE, change, copy_of, engines_of, scale, small_bundle, transpose, write_plans
from sparsectrl_lcm.engine.build import build
from sparsectrl_lcm.engine.verify import verify as verify_module
from sparsectrl_lcm.engine.verify.layers import MARKED, first_jump
from sparsectrl_lcm.engine.verify.marked_graphs import Suspect
from sparsectrl_lcm.engine.verify.report import Report
from sparsectrl_lcm.engine.verify.runners import RuntimeRunner
from sparsectrl_lcm.engine.verify.saved_results import SavedResults
from sparsectrl_lcm.engine.verify.verify import VerifyOptions, verify
from sparsectrl_lcm.runtime import BackendError
from sparsectrl_lcm.runtime.backend_interface import Availability
from sparsectrl_lcm.runtime.format.build_options import BuildOptions
from sparsectrl_lcm.runtime.format.bundle import Bundle, demo_bundle
from sparsectrl_lcm.runtime.format.clip_layout import ClipSize, engine_layout
from sparsectrl_lcm.runtime.format.engine_sets import EngineSet

PROMPTS, STEPS = 4, 4
"""Three requests, one of them with a negative prompt; steps of each."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = small_bundle(tmp_path_factory.mktemp("verify") / "bundle")
    build(folder, "onnxruntime")
    return Bundle.load(folder)


@pytest.fixture(scope="module")
def saved(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """All results of ONNX Runtime's engines, and their report."""
    folder = tmp_path_factory.mktemp("saved") / "results"
    return folder, verify(bundle, VerifyOptions("onnxruntime", save=folder))


# Requests


def test_requests_are_recorded_as_engines_take_them(bundle: Bundle, saved: tuple[Path, Report]) -> None:
    results = SavedResults.load(saved[0], bundle)
    runs, layout = results.header.runs, engine_layout(bundle.manifest, SIZE)
    expected = {"text_encoder": PROMPTS, "unet": PROMPTS * STEPS, "lcm_update": 3 * STEPS, "vae_decoder": 3, "clip": 3}
    assert runs.items() >= expected.items()
    assert runs["controlnet_scribble"] + runs["controlnet_rgb"] == 3 * STEPS
    for graph, record in bundle.manifest.graphs.items():
        shapes = layout.shapes(graph, record)
        for item in record.inputs:
            values = results.inputs(graph, runs[graph] - 1)[item.name]
            assert (values.shape, values.dtype) == (shapes[item.name], item.dtype), item
    steps = [results.inputs("unet", index) for index in range(STEPS)]  # the first request, without keyframes
    assert sorted((float(step["timestep"][0]) for step in steps), reverse=True) == [
        float(step["timestep"][0]) for step in steps
    ]
    assert not any(step["mid_residual"].any() for step in steps)
    assert results.inputs("unet", STEPS)["mid_residual"].any()
    assert results.inputs("controlnet_rgb", 0)["conditioning_mask"].tolist() == [1, 1, 0, 0], "an empty slot"


def test_polygraphy_takes_saved_inputs_and_outputs(
    bundle: Bundle, saved: tuple[Path, Report], capfd: pytest.CaptureFixture[str]
) -> None:
    from polygraphy.tools import main

    graph = bundle.folder / bundle.graph("lcm_update").path
    folder = saved[0] / "lcm_update"
    files = ["--load-inputs", folder / "inputs", "--load-outputs", folder / "runtime"]
    assert main(list(map(str, ["run", graph, "--onnxrt", *files]))) == 0
    said = capfd.readouterr().out
    assert f"{3 * STEPS}" in said
    assert "PASSED" in said


# Comparisons


def test_engines_pass(bundle: Bundle, saved: tuple[Path, Report]) -> None:
    report = saved[1]
    assert report.passed
    assert {row.graph for row in report.rows} == {*bundle.manifest.graphs, "clip"}
    assert {row.precision for row in report.rows} == {"fp32"}
    differences = [row.outputs[row.output] for row in report.rows]
    assert 0 < max(each.largest for each in differences if each.levels is None) < 1e-5
    assert max(each.levels for each in differences if each.levels is not None) < 0.01, "of 255: roundings of a few"


def test_another_backend_takes_the_requests_and_is_judged_where_it_is_missing(
    bundle: Bundle, saved: tuple[Path, Report], tmp_path: Path
) -> None:
    """Judged in another process, in which OpenVINO cannot be imported."""
    graphs = ("lcm_update", "vae_encoder")
    report = verify(bundle, VerifyOptions("openvino", graphs=graphs, load=saved[0], save=tmp_path / "results"))
    assert (report.run.backend, report.run.precision, report.passed) == ("openvino", "fp32", True)
    assert [row.graph for row in report.rows] == ["vae_encoder", "lcm_update"]
    hidden = "import sys; sys.modules.update(dict.fromkeys(('openvino', 'torch', 'cuda')))"
    code = f"{hidden}\nfrom sparsectrl_lcm.cli import main; main()"
    words = ["verify", bundle.folder, "--load", tmp_path / "results", "--json", *(f"--graph={name}" for name in graphs)]
    result = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == json.loads(json.dumps(report.as_dict()))


def test_a_transposed_residual_is_found(bundle: Bundle, saved: tuple[Path, Report], tmp_path: Path) -> None:
    """The scaled residual is computed early, but its result is used hundreds of nodes later."""
    wrong = copy_of(bundle, tmp_path / "bundle")
    change(engines_of(wrong, "onnxruntime"), "unet", transpose("down_residual_2"))
    recording = Path(shutil.copytree(saved[0], tmp_path / "recording", ignore=shutil.ignore_patterns("runtime")))
    SavedResults.load(recording, bundle).update(run=None)
    report = verify(wrong, VerifyOptions("onnxruntime", graphs=("unet",), layers=True, load=recording))
    assert report.failed_graphs == ("unet",)
    jump = report.jumps["unet"]
    assert jump is not None
    assert (jump.operator, jump.takes) == ("Mul", ("conditioning_scale", "down_residual_2"))
    assert jump.before < 1e-4
    assert jump.error > 1e-2


def test_a_changed_weight_is_found(bundle: Bundle, saved: tuple[Path, Report], tmp_path: Path) -> None:
    weight = "encoder.mid_block.resnets.0.conv1.weight"
    wrong = copy_of(bundle, tmp_path / "bundle")
    left = [graph for graph in wrong.manifest.graphs if graph != "vae_encoder"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparsectrl_lcm.engine.openvino.IN_FP32", left)
        build(wrong, "openvino", BuildOptions(precision="fp32", check=False))
    change(engines_of(wrong, "openvino"), "vae_encoder", scale(weight, 1.3))
    report = verify(wrong, VerifyOptions("openvino", graphs=("vae_encoder",), layers=True, load=saved[0]))
    jump = report.jumps["vae_encoder"]
    assert jump is not None
    assert jump.operator == "Conv"
    assert weight in jump.takes
    assert jump.before < 1e-4
    assert jump.error > 0.1


def test_a_fault_that_outputs_hide_is_told_apart(
    bundle: Bundle, saved: tuple[Path, Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is wrong with the engine once tensors are outputs: as if a compiler had fused wrongly."""
    feeds = SavedResults.load(saved[0], bundle).inputs("lcm_update", 0)
    asked: list[list[str]] = []

    def right(suspect: Suspect, names: list[str]) -> dict[str, float]:
        asked.append(names)
        return dict.fromkeys(names, 1e-7)

    monkeypatch.setattr("sparsectrl_lcm.engine.verify.layers.tensor_errors", right)
    assert first_jump(Suspect(bundle, "onnxruntime", "fp32", SIZE, None, "unet", feeds)) is None
    (names,) = asked
    assert len(names) == MARKED
    assert names[-1] == "conv2d_49", "the last convolution"


# On a GPU: emulated


class Faulty(PortableGraphs):
    """Computes with the portable graphs, except that a residual reaches the UNet three times as large."""

    def __call__(self, graph: str, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        if graph == "unet":
            feeds = {**feeds, "mid_residual": feeds["mid_residual"] * 3}
        return super().__call__(graph, feeds)


@pytest.fixture
def emulated(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """A bundle with plans for TensorRT, on an emulated device that computes with the portable graphs."""
    copy = copy_of(bundle, tmp_path / "bundle")
    write_plans(copy, "tensorrt", version="11.4", device="H200")
    monkeypatch.setattr(verify_module, "availability", lambda name: Availability(name, "11.4"))
    monkeypatch.setattr(verify_module, "probe", lambda: "H200")
    use(monkeypatch, PortableGraphs(copy))
    return copy


def use(monkeypatch: pytest.MonkeyPatch, compute: PortableGraphs) -> None:
    monkeypatch.setattr(verify_module, "open_executor", lambda bundle, *_: emulate(bundle, compute).executor)


def test_a_fault_of_this_runtime_is_told_from_one_of_the_plan(
    emulated: Bundle, saved: tuple[Path, Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = emulate(emulated, PortableGraphs(emulated)).executor
    use(monkeypatch, Faulty(emulated))

    def library(bundle: Bundle, engines: EngineSet, graph: str, size: ClipSize, name: str) -> RuntimeRunner:
        runner = RuntimeRunner(lambda: right.open_graph(graph, size), bundle.graph(graph))
        runner.name = name
        return runner

    monkeypatch.setattr("sparsectrl_lcm.engine.tensorrt.plan_runner.library_runner", library)
    report = verify(emulated, VerifyOptions("tensorrt", load=saved[0], graphs=("unet", "lcm_update")))
    verdicts = {(row.graph, row.runner): bool(row.exceeded) for row in report.rows}
    assert verdicts == {
        ("unet", "runtime"): True,
        ("unet", "library"): False,
        ("lcm_update", "runtime"): False,
        ("lcm_update", "library"): False,
    }


def test_a_library_that_cannot_run_alone_is_a_note(emulated: Bundle, saved: tuple[Path, Report]) -> None:
    report = verify(emulated, VerifyOptions("tensorrt", load=saved[0], graphs=("lcm_update",)))
    assert report.passed
    (note,) = report.run.notes
    assert note == "lcm_update did not run on the library alone: tensorrt is not installed"


@pytest.fixture(scope="module")
def compute(bundle: Bundle) -> PortableGraphs:
    return PortableGraphs(bundle)


@pytest.mark.parametrize(
    ("distort", "capturable", "way"),
    [(list, True, "replayed"), (lambda work: [], True, "not replayed"), (list, False, "engine graphs")],
)
def test_clips_run_plain_and_replayed(
    emulated: Bundle,
    compute: PortableGraphs,
    saved: tuple[Path, Report],
    monkeypatch: pytest.MonkeyPatch,
    distort: Any,
    capturable: bool,
    way: str,
) -> None:
    """Frames are right in all cases: a graph that leaves work out is not used, and engines may not be capturable."""
    machines = []

    def opened(bundle: Bundle, backend: str, options: Any) -> Any:
        machines.append(emulate(bundle, compute, cuda_graphs=options.cuda_graphs))
        machines[-1].cudart.distort, machines[-1].loader.capturable = distort, capturable
        return machines[-1].executor

    monkeypatch.setattr(verify_module, "open_executor", opened)
    report = verify(emulated, VerifyOptions("tensorrt", load=saved[0], graphs=("clip",)))
    assert [(row.graph, row.runner, row.runs) for row in report.rows] == [("clip", "plain", 3), ("clip", way, 3)]
    assert not any(row.exceeded for row in report.rows)
    assert report.failed_graphs == (("clip",) if way == "not replayed" else ())
    assert report.passed == (way != "not replayed")
    assert [note[:32] for note in report.run.notes] == ["3 of 3 clips were not replayed a"] * (not report.passed)
    replayed, plain = machines
    assert "cudaGraphLaunch" not in plain.cudart.calls
    launches = {"replayed": 18, "not replayed": 9, "engine graphs": 0}  # three parts of a clip, and once for its proof
    assert replayed.cudart.calls.count("cudaGraphLaunch") == launches[way]


# Interruptions


@pytest.mark.usefixtures("raising")
def test_ctrl_c_in_the_library_leaves_the_graph_unfinished(
    emulated: Bundle, saved: tuple[Path, Report], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The library swallows the KeyboardInterrupt, and fails with an error of its own."""

    def library(*_: object) -> RuntimeRunner:
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise BackendError("verify", "the library failed")

    monkeypatch.setattr("sparsectrl_lcm.engine.tensorrt.plan_runner.library_runner", library)
    folder = tmp_path / "results"
    with pytest.raises(KeyboardInterrupt):
        verify(emulated, VerifyOptions("tensorrt", graphs=("lcm_update",), load=saved[0], save=folder))
    report = verify(emulated, VerifyOptions(load=folder))
    assert [(row.graph, row.runner) for row in report.rows] == [("lcm_update", "runtime")]
    assert (report.missing, report.passed) == (("lcm_update",), False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "precision"),
    [("openvino", "fp32"), ("openvino", "bf16"), ("openvino", "int8"), ("onnxruntime", "fp32")],
)
def test_all_engines_of_the_demo_bundle_pass(backend: str, precision: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(demo_bundle(), tmp_path / "bundle"))
    build(folder, backend, BuildOptions(precision=precision, check=False))
    report = verify(Bundle.load(folder), VerifyOptions(backend, precision))
    assert report.passed, report.failed_graphs
    assert report.run.precision == precision
