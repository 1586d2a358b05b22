"""Builds by TensorRT that fail or are incomplete, with strict fakes of each release."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fakes.tensorrt_builds import (
    BYTES_MOVED,
    RELEASES,
    Workshop,
    small_copy,
)
from sparsectrl_lcm.engine.tensorrt.timing_cache import TimingCache
from sparsectrl_lcm.runtime.errors import BackendError, DeviceOutOfMemory
from sparsectrl_lcm.runtime.format.engine_sets import find_set
from sparsectrl_lcm.runtime.format.layer_report import LayerReport

FAILURES = {
    "parser": "OnnxParser.parse_from_file",
    "builder": "Builder.build_serialized_network",
}


@pytest.fixture(params=RELEASES)
def workshop(request: pytest.FixtureRequest) -> Workshop:
    return Workshop(request.param)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return small_copy(tmp_path)


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


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
    assert message.startswith(f"backend: {workshop.backend} {workshop.version} cannot ")
    assert "'text_encoder'" in message
    assert entries(previous) == ["engines.json"]
    assert workshop.left(bundle) == ([previous.name], workshop.timings() if part == "builder" else None)


@pytest.mark.parametrize("reason", ["cannot load the engine that it built: Error Code 1: another device", "Expecting"])
def test_an_engine_is_kept_without_a_report_of_its_layers(
    bundle: Path, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    workshop = Workshop("11.4")
    if reason == "Expecting":
        workshop.trt.answers["EngineInspector.get_engine_information"] = lambda *_: '{"Layers": ['
    else:
        workshop.fail("Runtime.deserialize_cuda_engine", "Error Code 1:\nanother device")
    index = workshop.build(bundle)
    assert find_set(bundle, workshop.backend, "64x64x4-fp16") is not None
    for graph, record in index.engines.items():
        assert LayerReport.of(record.report) is None
        (warning,) = [each.message for each in caplog.records if repr(graph) in each.message]
        assert warning.startswith(f"there is no report of the layers of {graph!r}: ")
        assert reason in warning


@pytest.mark.parametrize(("words", "options"), [("FP32", {}), ("FP16", {}), ("FP32", {"fp16_sums": True})])
def test_a_build_warns_if_products_became_fp32(
    words: str, options: dict[str, bool], bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """TensorRT may compute a layer between casts in fp32, at a fraction of the speed, instead of making one kernel."""
    tensors = [{"Name": "x", "Dimensions": [4, 64], "Format/Datatype": f"Row major linear {words} format"}]
    product = {"Name": "to_q", "LayerType": "gemm", "Inputs": tensors, "Outputs": tensors}
    product["Constants"] = [{**tensors[0], "Name": "w", "Dimensions": [64, 64]}]
    workshop = Workshop("11.4")
    workshop.trt.answers["EngineInspector.get_engine_information"] = lambda *_: json.dumps({"Layers": [product]})
    workshop.build(bundle, graphs=("text_encoder",), **options)
    expected = ["text_encoder: 100% of the products became fp32, which is slow: try --fp16-sums"]
    assert [each.message for each in caplog.records] == (expected if words == "FP32" and not options else [])


def test_a_build_without_a_list_of_kernels_has_no_list_of_an_earlier_one(bundle: Path) -> None:
    workshop = Workshop("rtx-1.7")
    build_one, done = workshop.trt.answers["Builder.build_serialized_network"], []

    def log_once(*args: Any) -> Any:
        done.append(args)
        return build_one(*args) if len(done) == 1 else b"a plan"

    workshop.trt.answers["Builder.build_serialized_network"] = log_once
    reports = [record.report for record in workshop.build(bundle).engines.values()]
    assert [report["bytes_moved"] for report in reports] == [BYTES_MOVED, None, None, None]
    assert [report["layers"] == {} for report in reports] == [False, True, True, True]


@pytest.mark.parametrize(
    ("complaints", "kind"),
    [
        (["Cuda Runtime (out of memory)"], DeviceOutOfMemory),
        (["[defaultAllocator] Cuda failure: OutOfMemory", "Error Code 2:\n no context"], DeviceOutOfMemory),
        (["Error Code 4:\n no context"], BackendError),
        ([], BackendError),
    ],
)
def test_memory_that_has_run_out_is_an_error_of_its_own(
    workshop: Workshop, complaints: list[str], kind: type[BackendError]
) -> None:
    for complaint in complaints:
        workshop.complain(complaint)
    error = workshop.library.failure("cannot go on")
    assert type(error) is kind
    reason = " ".join(complaints[-1].split()) if complaints else "it gave no reason"
    assert str(error) == f"backend: {workshop.backend} {workshop.version} cannot go on: {reason}"
    assert type(workshop.library.failure("cannot go on")) is BackendError


@pytest.mark.parametrize(
    ("last", "kind"), [("Error Code 10: no kernel for x", BackendError), ("Error 2: OutOfMemory", DeviceOutOfMemory)]
)
def test_kernels_that_did_not_fit_are_not_why_a_build_fails(
    workshop: Workshop, bundle: Path, last: str, kind: type[BackendError]
) -> None:
    def fails(*_: Any) -> None:
        workshop.complain("Requested amount of GPU memory could not be allocated: out of memory")
        workshop.complain(last)

    workshop.trt.answers["Builder.build_serialized_network"] = fails
    with pytest.raises(BackendError, match=f"cannot build 'text_encoder': {last}") as error:
        workshop.build(bundle)
    assert type(error.value) is kind


def test_a_complaint_belongs_to_one_failure(workshop: Workshop, bundle: Path) -> None:
    """A later failure without a reason of its own must not repeat the earlier reason."""
    workshop.fail("OnnxParser.parse_from_file", "the file\nis damaged", False)
    with pytest.raises(BackendError, match="cannot parse 'text_encoder': the file is damaged$"):
        workshop.build(bundle)
    workshop.trt.answers["OnnxParser.parse_from_file"] = lambda *_: False
    with pytest.raises(BackendError, match="cannot parse 'text_encoder': it gave no reason$"):
        workshop.build(bundle)


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


def test_a_failure_half_way_leaves_what_was_measured_alone(workshop: Workshop, bundle: Path) -> None:
    build_one, done = workshop.trt.answers["Builder.build_serialized_network"], []

    def build_two(*args: Any) -> Any:
        done.append(args)
        if len(done) < 3:
            return build_one(*args)
        workshop.measure(args[2])
        return workshop.complain("out of memory")

    workshop.trt.answers["Builder.build_serialized_network"] = build_two
    with pytest.raises(BackendError, match="cannot build 'lcm_update': out of memory"):
        workshop.build(bundle)
    measured = workshop.timings("text_encoder", "unet", "lcm_update")
    assert workshop.left(bundle) == (["unfinished: text_encoder, unet"], measured)
    again = Workshop(workshop.release)
    again.build(bundle)
    known = [bytes(blob).decode() for (blob,) in again.calls("IBuilderConfig.create_timing_cache")]
    assert known[:1] == ([] if measured is None else [measured])


def test_a_new_build_takes_the_place_of_the_previous_one(workshop: Workshop, bundle: Path) -> None:
    folder = workshop.folder(bundle)
    folder.mkdir(parents=True)
    (folder / "unet.kernels").write_bytes(b"of the previous engine")
    index = workshop.build(bundle)
    assert entries(folder) == sorted([*(f"{graph}.engine" for graph in index.engines), "engines.json"])
    assert workshop.left(bundle)[0] == [folder.name]


def test_timings_that_cannot_be_written_leave_nothing(bundle: Path) -> None:
    """A folder has the name of their file."""
    library: Any = SimpleNamespace(backend="tensorrt", version="11.4", is_rtx=False)
    device: Any = SimpleNamespace(name="NVIDIA H200", compute_capability="9.0")
    config: Any = SimpleNamespace(
        create_timing_cache=lambda known: SimpleNamespace(serialize=lambda: b"measured"),
        set_timing_cache=lambda cache, ignore_mismatch: None,
        get_timing_cache=lambda: SimpleNamespace(serialize=lambda: b"measured"),
    )
    cache = TimingCache(bundle, library, device)
    folder = bundle / "engines/tensorrt"
    (folder / "timing-11.4-NVIDIA-H200-9.0.cache").mkdir(parents=True)
    cache.attach(config)
    cache.detach(config)
    assert [path.name for path in folder.iterdir()] == ["timing-11.4-NVIDIA-H200-9.0.cache"]
