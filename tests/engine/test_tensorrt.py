"""The TensorRT builder against strict fakes of each release; what a GPU makes of a graph is not in question here."""

import ast
import json
import operator
import re
import signal
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sparsectrl_lcm.engine import tensorrt as builder
from sparsectrl_lcm.engine.layers import summarize
from sparsectrl_lcm.engine.options import HARDWARE_COMPATIBILITY, TensorRtOptions
from sparsectrl_lcm.engine.tensorrt import configure, make_progress_monitor
from sparsectrl_lcm.runtime.bundle import Bundle
from sparsectrl_lcm.runtime.engines import ClipSize, EngineIndex, find_set, set_name, static_shapes
from sparsectrl_lcm.runtime.errors import BackendError, InvalidRequest, SparseCtrlLcmError
from sparsectrl_lcm.runtime.weights import WeightTable
from tensorrt_builds import (
    LAYERS,
    PHASES,
    RELEASES,
    SIZE,
    Event,
    Workshop,
    demo_copy,
    fake,
    finish,
    phase,
    plan_of,
    report,
    small_copy,
    start,
    steps,
)
from tensorrt_fakes import FakeModule

ROOT = Path(__file__).parent.parent.parent
TENSORRT = [release for release, backend in RELEASES.items() if backend == "tensorrt"]
FAILURES = {
    "parser": "OnnxParser.parse_from_file",
    "builder": "Builder.build_serialized_network",
    "loader": "Runtime.deserialize_cuda_engine",
}


@dataclass
class Built:
    """A whole build that is only read."""

    workshop: Workshop
    bundle: Bundle
    index: EngineIndex
    progress: list[tuple[str, float]]

    @property
    def folder(self) -> Path:
        return self.workshop.folder(self.bundle.folder)

    def plan(self, graph: str) -> dict[str, Any]:
        return plan_of(self.folder / f"{graph}.engine")


@pytest.fixture(scope="module", params=RELEASES)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Built]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("user-cache")))
        bundle, workshop = demo_copy(tmp_path_factory.mktemp("built")), Workshop(request.param)
        progress: list[tuple[str, float]] = []
        index = workshop.build(bundle, on_progress=lambda *told: progress.append(told))
        yield Built(workshop, Bundle.load(bundle), index, progress)


@pytest.fixture(params=RELEASES)
def workshop(request: pytest.FixtureRequest) -> Workshop:
    return Workshop(request.param)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return small_copy(tmp_path)


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Options


def configured(release: str, **options: Any) -> FakeModule:
    """A fake whose calls are those of `configure`."""
    trt = fake(release)
    configure(trt, trt.new("IBuilderConfig"), RELEASES[release], TensorRtOptions(**options))
    return trt


def settings(trt: FakeModule) -> dict[str, Any]:
    """Properties that were set, by name."""
    return {name[len("IBuilderConfig.") : -1]: args[0] for name, args, _ in trt.calls if name.endswith("=")}


def arguments(trt: FakeModule, method: str) -> list[tuple[Any, ...]]:
    return [args for name, args, _ in trt.calls if name == f"IBuilderConfig.{method}"]


@pytest.mark.parametrize("release", RELEASES)
def test_by_default_little_is_asked_of_the_builder(release: str) -> None:
    trt = configured(release)
    common = {
        "builder_optimization_level": 3,
        "max_aux_streams": 0,
        "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,
    }
    if RELEASES[release] == "tensorrt":
        assert settings(trt) == common | {"hardware_compatibility_level": trt.HardwareCompatibilityLevel.NONE}
        assert arguments(trt, "set_flag") == []
    else:
        assert settings(trt) == common | {"num_compute_capabilities": 0}
        assert arguments(trt, "set_flag") == [(trt.BuilderFlag.REQUIRE_USER_ALLOCATION,)]
    assert arguments(trt, "clear_flag") == arguments(trt, "set_memory_pool_limit") == []


@pytest.mark.parametrize("release", TENSORRT)
def test_every_option_of_tensorrt_reaches_the_builder(release: str) -> None:
    trt = configured(
        release,
        optimization_level=5,
        aux_streams=2,
        workspace=1.5,
        tf32=False,
        strip_weights=True,
        version_compatible=True,
        hardware_compatibility="ampere-plus",
    )
    assert settings(trt) == {
        "builder_optimization_level": 5,
        "max_aux_streams": 2,
        "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,
        "hardware_compatibility_level": trt.HardwareCompatibilityLevel.AMPERE_PLUS,
    }
    flags = trt.BuilderFlag
    assert {flag for (flag,) in arguments(trt, "set_flag")} == {
        flags.REFIT,
        flags.STRIP_PLAN,
        flags.VERSION_COMPATIBLE,
    }
    assert arguments(trt, "clear_flag") == [(flags.TF32,)]
    assert arguments(trt, "set_memory_pool_limit") == [(trt.MemoryPoolType.WORKSPACE, 3 << 29)]


def test_every_option_of_tensorrt_rtx_reaches_the_builder() -> None:
    capabilities = ("8.9", "12.0")
    trt = configured(
        "rtx-1.7",
        optimization_level=0,
        aux_streams=1,
        workspace=2,
        tf32=False,
        strip_weights=True,
        compute_capabilities=capabilities,
    )
    assert settings(trt) == {
        "builder_optimization_level": 0,
        "max_aux_streams": 1,
        "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,
        "num_compute_capabilities": 2,
    }
    flags = trt.BuilderFlag
    assert {flag for (flag,) in arguments(trt, "set_flag")} == {
        flags.REFIT,
        flags.STRIP_PLAN,
        flags.REQUIRE_USER_ALLOCATION,
    }
    assert arguments(trt, "clear_flag") == [(flags.TF32,)]
    assert arguments(trt, "set_memory_pool_limit") == [(trt.MemoryPoolType.WORKSPACE, 2 << 30)]
    known = trt.ComputeCapability
    assert arguments(trt, "set_compute_capability") == [(known.SM89, 0), (known.SM120, 1)]


@pytest.mark.parametrize("release", RELEASES)
def test_refit_alone_leaves_the_weights_in(release: str) -> None:
    trt = configured(release, refit=True)
    flags = [flag for (flag,) in arguments(trt, "set_flag")]
    assert trt.BuilderFlag.REFIT_INDIVIDUAL in flags
    assert trt.BuilderFlag.STRIP_PLAN not in flags


@pytest.mark.parametrize("release", TENSORRT)
@pytest.mark.parametrize("level", HARDWARE_COMPATIBILITY)
def test_each_hardware_compatibility_has_its_level(release: str, level: str) -> None:
    trt = configured(release, hardware_compatibility=level)
    expected = getattr(trt.HardwareCompatibilityLevel, level.upper().replace("-", "_"))
    assert settings(trt)["hardware_compatibility_level"] == expected


def test_the_order_of_compute_capabilities_does_not_matter() -> None:
    one, other = (TensorRtOptions(compute_capabilities=given) for given in (("8.9", "12.0"), ("12.0", "8.9")))
    assert one.flags == other.flags


@pytest.mark.parametrize("capability", ["9.0", "8", "current", ""])
def test_an_unknown_compute_capability_is_refused_before_anything_is_built(capability: str, bundle: Path) -> None:
    workshop = Workshop("rtx-1.7")
    with pytest.raises(SparseCtrlLcmError, match="--compute-capability") as error:
        workshop.build(bundle, compute_capabilities=("8.9", capability))
    assert workshop.calls("Builder", "OnnxParser") == []
    message = str(error.value)
    assert repr(capability) in message
    assert "\n" not in message
    allowed = message.partition("allowed are ")[2].split(", ")
    assert sorted(allowed) == sorted(["7.5", "8.0", "8.6", "8.9", "12.0", "12.1"])


def test_an_option_of_the_other_backend_is_refused(bundle: Path) -> None:
    with pytest.raises(InvalidRequest, match="--compute-capability is for tensorrt-rtx"):
        Workshop("11.4").build(bundle, compute_capabilities=("8.9",))
    with pytest.raises(InvalidRequest, match="--hardware-compatibility is for tensorrt"):
        Workshop("rtx-1.7").build(bundle, hardware_compatibility="ampere-plus")
    assert not (bundle / "engines").exists()


def test_version_compatibility_is_refused_for_tensorrt_rtx(bundle: Path) -> None:
    """TensorRT-RTX has the flag, but fails to build with it: there is no lean runtime."""
    with pytest.raises(InvalidRequest, match="--version-compatible is for tensorrt"):
        Workshop("rtx-1.7").build(bundle, version_compatible=True)


# A whole build


def test_every_graph_gets_an_engine_and_nothing_else_stays(built: Built) -> None:
    graphs = list(built.bundle.manifest.graphs)
    assert entries(built.folder) == sorted([*(f"{graph}.engine" for graph in graphs), "engines.json"])
    assert list(built.index.engines) == graphs
    assert [built.plan(graph)["graph"] for graph in graphs] == graphs
    beside = [name for name in entries(built.folder.parent) if not name.startswith("timing-")]
    assert beside == ["64x64x4-fp16"]


def test_the_index_tells_what_the_engines_depend_on(built: Built) -> None:
    found = find_set(built.bundle.folder, built.workshop.backend, set_name("fp16", SIZE))
    assert found is not None
    assert found.index == built.index
    for graph, record in found.index.engines.items():
        assert record.key == record.spec.key()
        assert record.spec.graph == graph
        assert record.spec.version == built.workshop.version
        scope = {"tensorrt": "NVIDIA H200 (compute capability 9.0)", "tensorrt-rtx": "any"}
        assert record.spec.device == scope[built.workshop.backend]
        assert found.open(built.bundle.manifest, graph, record.spec.version, record.spec.device).is_file()


def test_inputs_get_the_static_shapes_of_the_size(built: Built) -> None:
    for graph, record in built.bundle.manifest.graphs.items():
        shapes = static_shapes(built.bundle.manifest, graph, SIZE)
        expected = {item.name: shapes[item.name] for item in record.inputs}
        assert {name: tuple(shape) for name, shape in built.plan(graph)["shapes"].items()} == expected
        assert built.index.engines[graph].spec.shapes == expected
    assert built.plan("unet")["shapes"]["latents"] == [1, 4, 4, 8, 8]
    assert built.plan("controlnet_scribble")["shapes"]["conditioning"] == [4, 64, 64, 3]


def test_networks_are_strongly_typed_and_attention_may_be_split(built: Built) -> None:
    strongly_typed = 1 << int(built.workshop.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    assert set(built.workshop.calls("Builder.create_network")) == {(strongly_typed,)}
    attentions = built.plan("unet")["decomposable"]
    assert attentions
    assert all(attentions)


def test_the_index_tells_what_the_engines_are_made_of(built: Built) -> None:
    for record in built.index.engines.values():
        assert record.report["layers"] == {layer["LayerType"]: 1 for layer in LAYERS}
        assert record.report["seconds"] >= 0


def test_progress_names_every_graph(built: Built) -> None:
    fractions = [fraction for _, fraction in built.progress]
    assert fractions == sorted(fractions)
    assert 0 <= fractions[0] <= fractions[-1] <= 1
    graphs = list(built.bundle.manifest.graphs)
    named = list(dict.fromkeys(text.partition(":")[0] for text, _ in built.progress))
    assert named == [f"{graph} ({place}/{len(graphs)})" for place, graph in enumerate(graphs, start=1)]


@pytest.mark.parametrize("release", TENSORRT)
def test_what_was_measured_of_kernels_serves_the_next_build(release: str, bundle: Path) -> None:
    first, second = Workshop(release), Workshop(release)
    graphs = list(first.build(bundle).engines)
    folder = first.folder(bundle).parent
    (name,) = [name for name in entries(folder) if name.startswith("timing-")]
    assert first.version in name
    assert "H200-9.0" in name
    measured = "".join(f"{graph};" for graph in graphs).encode()
    assert (folder / name).read_bytes() == measured
    known = [bytes(blob) for (blob,) in first.calls("IBuilderConfig.create_timing_cache")]
    assert known[:2] == [b"", f"{graphs[0]};".encode()]
    second.build(bundle, ClipSize(width=128, height=64, frames=2))
    assert bytes(second.calls("IBuilderConfig.create_timing_cache")[0][0]) == measured
    assert entries(folder) == sorted([name, "64x64x4-fp16", "128x64x2-fp16"])


def test_tensorrt_rtx_measures_no_kernels(bundle: Path) -> None:
    workshop = Workshop("rtx-1.7")
    workshop.build(bundle)
    assert entries(workshop.folder(bundle).parent) == ["64x64x4-fp16"]
    assert workshop.calls("IBuilderConfig.create_timing_cache", "IBuilderConfig.set_timing_cache") == []


def check_weight_tables(workshop: Workshop, bundle: Path, index: EngineIndex) -> None:
    """By its table the bundle gives, bit for bit, the weights that were parsed."""
    opened, folder = Bundle.load(bundle), workshop.folder(bundle, index.precision)
    for graph, record in index.engines.items():
        assert set(record.files) == {f"{graph}.engine", f"{graph}.weights.json"}
        table = WeightTable.model_validate_json((folder / f"{graph}.weights.json").read_text())
        values = {name: zlib.crc32(table.read(opened, name).tobytes()) for name in table.root}
        assert values == plan_of(folder / f"{graph}.engine")["weights"]
        assert bool(values) == (graph != "lcm_update")


@pytest.mark.parametrize(("option", "precision"), [("refit", "bf16"), ("strip_weights", "fp32")])
def test_weight_tables_lie_beside_engines_that_can_be_refitted(
    workshop: Workshop, bundle: Path, option: str, precision: str
) -> None:
    check_weight_tables(workshop, bundle, workshop.build(bundle, precision=precision, **{option: True}))


def test_weight_tables_know_every_weight_of_every_graph(tmp_path: Path) -> None:
    workshop, bundle = Workshop("11.4"), demo_copy(tmp_path)
    check_weight_tables(workshop, bundle, workshop.build(bundle, refit=True))


@pytest.mark.parametrize("release", TENSORRT)
def test_a_version_compatible_engine_may_be_loaded_where_it_was_built(release: str, bundle: Path) -> None:
    workshop = Workshop(release)
    index = workshop.build(bundle, version_compatible=True)
    assert {record.spec.version for record in index.engines.values()} == {f"{release.partition('.')[0]}.x"}


# Without a GPU


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def probe() -> None:
        raise BackendError("backend: no NVIDIA driver was found; install one")

    monkeypatch.setattr(builder, "probe", probe)


@pytest.mark.usefixtures("no_gpu")
def test_tensorrt_rtx_builds_without_a_gpu(bundle: Path) -> None:
    workshop = Workshop("rtx-1.7")
    index = workshop.build(bundle, device=None, compute_capabilities=("12.0", "8.9"))
    assert list(index.engines) == list(Bundle.load(bundle).manifest.graphs)
    assert {record.spec.device for record in index.engines.values()} == {"8.9, 12.0"}
    assert workshop.calls("Runtime.deserialize_cuda_engine") == []


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("option", ["refit", "strip_weights"])
def test_tensorrt_rtx_needs_a_gpu_to_build_for_refit(bundle: Path, option: str) -> None:
    with pytest.raises(BackendError, match="no NVIDIA driver.*--refit and --strip-weights need a GPU"):
        Workshop("rtx-1.7").build(bundle, device=None, **{option: True})


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("release", TENSORRT)
def test_tensorrt_needs_a_gpu_before_it_is_touched(release: str, bundle: Path) -> None:
    workshop = Workshop(release)
    with pytest.raises(BackendError, match="no NVIDIA driver"):
        workshop.build(bundle, device=None)
    assert workshop.calls("Builder", "Runtime") == []


def test_engines_for_other_gpus_are_built_on_any(bundle: Path) -> None:
    """An H200 cannot load an engine for 8.9 alone, so nothing is told of its layers."""
    workshop = Workshop("rtx-1.7")
    workshop.fail("Runtime.deserialize_cuda_engine", "the engine is for other compute capabilities")
    index = workshop.build(bundle, compute_capabilities=("8.9",))
    assert {record.spec.device for record in index.engines.values()} == {"8.9"}


# Failures


@pytest.mark.parametrize("part", FAILURES)
def test_a_failure_is_told_in_one_line_and_leaves_the_previous_engines(
    workshop: Workshop, bundle: Path, part: str
) -> None:
    previous = workshop.folder(bundle)
    previous.mkdir(parents=True)
    (previous / "engines.json").write_text("the previous build")
    workshop.fail(FAILURES[part], "Error Code 10:\nno implementation was found", False if part == "parser" else None)
    with pytest.raises(BackendError, match="Error Code 10: no implementation was found") as error:
        workshop.build(bundle)
    message = str(error.value)
    assert "\n" not in message
    assert workshop.backend in message
    assert part == "loader" or "'text_encoder'" in message
    assert entries(previous) == ["engines.json"]
    assert [name for name in entries(previous.parent) if not name.startswith("timing-")] == [previous.name]


def test_an_error_of_the_parser_names_the_node(workshop: Workshop, bundle: Path) -> None:
    workshop.trt.answers |= {
        "OnnxParser.parse_from_file": lambda *_: False,
        "OnnxParser.num_errors": lambda _: 2,
        "ParserError.node_name": lambda _: "norm/Mul",
        "ParserError.desc": lambda _: "In node 3\n(importMul): UNSUPPORTED_NODE",
    }
    with pytest.raises(BackendError) as error:
        workshop.build(bundle)
    assert str(error.value) == (
        f"build: {workshop.backend} cannot parse 'text_encoder': norm/Mul: In node 3 (importMul): UNSUPPORTED_NODE"
    )


def test_a_failure_half_way_leaves_nothing(workshop: Workshop, bundle: Path) -> None:
    build_one, done = workshop.trt.answers["Builder.build_serialized_network"], []

    def build_two(*args: Any) -> Any:
        done.append(args)
        return build_one(*args) if len(done) < 3 else workshop.complain("out of memory")

    workshop.trt.answers["Builder.build_serialized_network"] = build_two
    with pytest.raises(BackendError, match="cannot build 'lcm_update': out of memory"):
        workshop.build(bundle)
    left = entries(workshop.folder(bundle).parent)
    assert [name.partition("-")[0] for name in left] == (["timing"] if workshop.backend == "tensorrt" else [])


def test_a_new_build_takes_the_place_of_the_previous_one(workshop: Workshop, bundle: Path) -> None:
    folder = workshop.folder(bundle)
    folder.mkdir(parents=True)
    (folder / "unet.kernels").write_bytes(b"of the previous engine")
    index = workshop.build(bundle)
    assert entries(folder) == sorted([*(f"{graph}.engine" for graph in index.engines), "engines.json"])
    assert [name for name in entries(folder.parent) if not name.startswith("timing-")] == [folder.name]


# Ctrl-C


def test_ctrl_c_ends_the_build_where_tensorrt_asks(workshop: Workshop, bundle: Path) -> None:
    """Within a callback nothing may be raised: the bindings would print it and go on."""
    answers: list[bool] = []

    def interrupted(_: Any, __: Any, config: Any) -> None:
        monitor = config.progress_monitor
        monitor.phase_start("Building engine", None, 6)
        answers.append(monitor.step_complete("Building engine", 0))
        signal.raise_signal(signal.SIGINT)
        answers.append(monitor.step_complete("Building engine", 1))
        monitor.phase_finish("Building engine")
        workshop.complain("Error Code 7: BuildCanceled")

    workshop.trt.answers["Builder.build_serialized_network"] = interrupted
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        workshop.build(bundle)
    assert answers == [True, False]
    assert signal.getsignal(signal.SIGINT) is before
    assert entries(workshop.folder(bundle).parent) == []


def test_ctrl_c_counts_though_the_engine_was_ready(workshop: Workshop, bundle: Path) -> None:
    def too_late(*_: Any) -> bytes:
        signal.raise_signal(signal.SIGINT)
        return b"plan"

    workshop.trt.answers["Builder.build_serialized_network"] = too_late
    with pytest.raises(KeyboardInterrupt):
        workshop.build(bundle)
    assert entries(workshop.folder(bundle).parent) == []


def test_the_handler_of_ctrl_c_comes_back_after_a_failure(workshop: Workshop, bundle: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    workshop.fail("Builder.build_serialized_network", "no memory")
    with pytest.raises(BackendError):
        workshop.build(bundle)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_thread_may_build(bundle: Path) -> None:
    """Python lets only the main thread set handlers."""
    done: list[Any] = []
    thread = threading.Thread(target=lambda: done.append(Workshop("11.4").build(bundle)))
    thread.start()
    thread.join()
    assert len(done) == 1


# Progress


def told(release: str, events: list[Event]) -> list[tuple[str, float]]:
    """What a build that reports these events tells."""
    seen: list[tuple[str, float]] = []
    monitor = make_progress_monitor(fake(release), lambda *one: seen.append(one), threading.Event())
    assert report(monitor, events)
    return seen


@pytest.mark.parametrize("release", RELEASES)
def test_progress_stays_within_its_bounds(release: str) -> None:
    seen = told(release, [*PHASES, *PHASES])
    assert all(0 <= fraction <= 1 for _, fraction in seen)
    assert {"cloning network graph", "timing graph nodes", "building engine"} <= {text for text, _ in seen}


@pytest.mark.parametrize("release", RELEASES)
def test_progress_never_runs_backwards(release: str) -> None:
    fractions = [fraction for _, fraction in told(release, PHASES)]
    assert fractions == sorted(fractions)
    assert fractions[-1] > fractions[0]


@pytest.mark.parametrize("release", RELEASES)
def test_steps_of_a_phase_within_a_phase_are_parts_of_its_step(release: str) -> None:
    events = [start("outer", None, 2), *phase("inner", "outer", 4), *steps("outer", 0, 1), finish("outer")]
    fractions = [(fraction - 0.2) / 0.8 for _, fraction in told(release, events)]
    assert fractions == pytest.approx([0, 0, 1 / 8, 2 / 8, 3 / 8, 4 / 8, 1 / 2, 1])


@pytest.mark.parametrize("release", RELEASES)
def test_a_phase_without_steps_does_no_harm(release: str) -> None:
    assert told(release, [start("empty", None, 0), finish("empty")]) == [("empty", pytest.approx(0.2))]


# Names that a release does not have

PRODUCT = [
    *("engine/tensorrt.py", "engine/options.py", "engine/layers.py", "runtime/engines.py", "runtime/weights.py"),
    *(f"runtime/gpu/{name}.py" for name in ("library", "tensorrt", "cuda", "engine")),
]


def ask_for_fp16(trt: Any) -> None:
    trt.new("IBuilderConfig").set_flag(trt.BuilderFlag.FP16)


def ask_for_the_old_size(trt: Any) -> None:
    assert trt.new("ICudaEngine").device_memory_size == 0


@pytest.mark.parametrize("use", [ask_for_fp16, ask_for_the_old_size])
def test_names_that_were_removed_fail(use: Callable[[Any], None]) -> None:
    use(fake("10.16"))
    for release in ("11.4", "rtx-1.7"):
        with pytest.raises(AttributeError, match=f"TensorRT {release} has no"):
            use(fake(release))


class Names(ast.NodeVisitor):
    """Attribute chains of TensorRT's module in a file, as `BuilderFlag.REFIT`, and the backends they are used for.

    The module is `trt` or `<library>.module`. A function that is called for one backend alone is of that backend.
    """

    BOTH = frozenset(RELEASES.values())

    def __init__(self, source: str) -> None:
        self._backends = self.BOTH
        self._function = ""
        self._aliases: dict[str, str] = {}
        self._used: list[tuple[str, frozenset[str], int, str]] = []
        self._called_for: dict[str, frozenset[str]] = {}
        self.visit(ast.parse(source))

    def found(self) -> Iterator[tuple[str, str, int]]:
        """Name, backend and line of each use."""
        for name, backends, line, function in self._used:
            for backend in backends & self._called_for.get(function, self.BOTH):
                yield name, backend, line

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outer, self._function = self._function, self._function or node.name
        self.generic_visit(node)
        self._function = outer

    def visit_If(self, node: ast.If) -> None:
        self._branch(node.test, node.body, node.orelse)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._branch(node.test, [node.body], [node.orelse])

    def visit_For(self, node: ast.For) -> None:
        """Only tensorrt-rtx takes compute capabilities."""
        of_rtx = "compute_capabilities" in ast.unparse(node.iter)
        self._within(frozenset(("tensorrt-rtx",)) if of_rtx else self.BOTH, [node.iter, *node.body])

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name):
            name = node.func.id
            self._called_for[name] = self._called_for.get(name, frozenset()) | self._backends
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        name = self._name(node.value)
        if name and isinstance(node.targets[0], ast.Name):
            self._aliases[node.targets[0].id] = name
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if name := self._name(node):
            self._used.append((name, self._backends, node.lineno, self._function))
        else:
            self.generic_visit(node)

    def _branch(self, test: ast.expr, then: Sequence[ast.AST], otherwise: Sequence[ast.AST]) -> None:
        asked = {text for text in self.BOTH if f"backend == '{text}'" in ast.unparse(test)}
        self._within(self.BOTH, [test])
        self._within(frozenset(asked) or self.BOTH, then)
        self._within(self.BOTH - asked if isinstance(test, ast.Compare) else self.BOTH, otherwise)

    def _within(self, backends: frozenset[str], nodes: Sequence[ast.AST]) -> None:
        outer, self._backends = self._backends, self._backends & backends
        for node in nodes:
            self.visit(node)
        self._backends = outer

    def _name(self, node: ast.expr) -> str:
        """`A.b` of `trt.A.b`; empty where the expression is none of TensorRT's."""
        text = re.sub(r"^[\w.]*\.module(?=\.)", "trt", ast.unparse(node)) if isinstance(node, ast.Attribute) else ""
        first, _, rest = text.partition(".")
        if first in self._aliases:
            return f"{self._aliases[first]}.{rest}"
        return rest if first == "trt" and re.fullmatch(r"[\w.]+", rest) else ""


def has(trt: FakeModule, name: str) -> bool:
    try:
        operator.attrgetter(name)(trt)
    except AttributeError:
        return False
    return True


def missing(source: str) -> list[tuple[int, str, str]]:
    """Line, release and name where a release may meet a name that it lacks."""
    fakes = {release: fake(release) for release in RELEASES}
    return [
        (line, release, name)
        for name, used_for, line in Names(source).found()
        for release, backend in RELEASES.items()
        if backend == used_for and not has(fakes[release], name)
    ]


def test_every_name_that_is_used_exists_in_every_release() -> None:
    sources = {path: (ROOT / path).read_text() for path in PRODUCT}
    assert {path: missing(source) for path, source in sources.items()} == {path: [] for path in PRODUCT}
    names = {name for source in sources.values() for name, _, _ in Names(source).found()}
    assert {"BuilderFlag.REFIT", "ComputeCapability", "HardwareCompatibilityLevel.AMPERE_PLUS", "Runtime"} <= names


def test_the_check_of_names_finds_what_is_wrong() -> None:
    source = """
def configure(trt, config, backend):
    config.set_flag(trt.BuilderFlag.FP16)
    if backend == "tensorrt-rtx":
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        only_rtx(trt)
    else:
        levels = trt.ComputeCapability
        config.level = levels.SM75

def only_rtx(trt):
    return trt.ComputeCapability

def both(self):
    return self.library.module.IRuntimeCache()
"""
    expected = {(3, "11.4", "BuilderFlag.FP16"), (3, "rtx-1.7", "BuilderFlag.FP16")}
    for release in TENSORRT:
        expected |= {(8, release, "ComputeCapability"), (9, release, "ComputeCapability.SM75")}
        expected |= {(15, release, "IRuntimeCache")}
    assert set(missing(source)) == expected


# Layers

SPATIAL = "down_blocks.0.attentions.0.transformer_blocks.0"
TEMPORAL = "down_blocks.0.motion_modules.0.temporal_transformer_blocks.0"


def kernel(name: str, kind: str, tactic: str, *nodes: str) -> dict[str, Any]:
    """A layer as the inspector tells it with detailed verbosity."""
    metadata = "".join(f"[ONNX Layer: {node}]" for node in nodes)
    return {"Name": name, "LayerType": kind, "TacticName": tactic, "StreamId": 0, "Metadata": metadata}


def fused(place: int, attention: str) -> dict[str, Any]:
    return kernel(f"_gemm_mha_v2_myl0_{place}", "kgen", "_gemm_mha_v2_0x957a2fe2", f"{attention}/Attention")


def test_layers_are_counted_by_type() -> None:
    layers = [
        kernel("conv_in/Conv", "CaskConvolution", "sm90_xmma_fprop", "conv_in/Conv"),
        fused(1, f"{SPATIAL}.attn1"),
        fused(2, f"{SPATIAL}.attn2"),
    ]
    assert summarize(layers)["layers"] == {"kgen": 2, "CaskConvolution": 1}
    assert summarize([]) == {
        "layers": {},
        "attention": {"spatial": {"fused": 0, "split": 0}, "temporal": {"fused": 0, "split": 0}},
    }


def test_fused_attention_is_counted_apart_for_space_and_time() -> None:
    layers = [
        kernel("to_q_myl0_0", "gemm", "sm90_xmma_gemm_f16f16", f"{SPATIAL}.attn1.to_q/MatMul"),
        fused(1, f"{SPATIAL}.attn1"),
        fused(2, f"{SPATIAL}.attn2"),
        fused(3, f"{TEMPORAL}.attn1"),
        kernel("__myl_Cast_myl0_4", "kgen", "__myl_Cast_0x1", "text_model.encoder.layers.0.self_attn/Cast"),
    ]
    assert summarize(layers)["attention"] == {
        "spatial": {"fused": 2, "split": 0},
        "temporal": {"fused": 1, "split": 0},
    }


@pytest.mark.parametrize(
    ("name", "kind", "tactic"),
    [
        (f"{SPATIAL}.attn1/Softmax", "SoftMaxV2", "softmax_warp"),
        ("__myl_MulAddMaxSubExpSumDivMul_myl0_7", "kgen", "__myl_MulAddMaxSubExpSumDivMul_0x5ec1f0b1"),
    ],
)
def test_a_softmax_within_an_attention_is_a_split_one(name: str, kind: str, tactic: str) -> None:
    layers = [
        kernel("scores_myl0_6", "gemm", "sm90_xmma_gemm_f16f32", f"{SPATIAL}.attn1/Attention"),
        kernel(name, kind, tactic, f"{SPATIAL}.attn1/Attention"),
        kernel("mixed_myl0_8", "gemm", "sm90_xmma_gemm_f16f32", f"{SPATIAL}.attn1/Attention"),
        kernel("vae_softmax", kind, tactic, "decoder.mid_block.attention/Softmax"),
    ]
    assert summarize(layers)["attention"] == {
        "spatial": {"fused": 0, "split": 1},
        "temporal": {"fused": 0, "split": 0},
    }


def test_layers_may_be_names_alone() -> None:
    """As engines are told that were built without detailed verbosity."""
    layers = ["conv_in/Conv", f"_gemm_mha_v2 {SPATIAL}.attn1/Attention", f"{TEMPORAL}.attn1.to_q/MatMul"]
    assert summarize(json.loads(json.dumps(layers))) == {
        "layers": {"unknown": 3},
        "attention": {"spatial": {"fused": 1, "split": 0}, "temporal": {"fused": 0, "split": 0}},
    }
