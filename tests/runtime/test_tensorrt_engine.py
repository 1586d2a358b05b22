"""TensorRT engines with strict fakes of each release, on an emulated stream."""

import ctypes
import gc
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.tensorrt_builds import ACTIVATION_BYTES, RELEASES, SIZE, TENSORRT, Workshop, plan_of, small_copy
from fakes.tensorrt_process import GRAPH, Opened, Process, one_line
from sparsectrl_lcm.runtime.errors import BackendError, DeviceOutOfMemory
from sparsectrl_lcm.runtime.format.bundle import Bundle
from sparsectrl_lcm.runtime.format.clip_layout import ClipSize, static_shapes
from sparsectrl_lcm.runtime.format.weights import WeightTable
from sparsectrl_lcm.runtime.gpu.cuda import Cuda

REFITTED = ClipSize(width=64, height=64, frames=2)
"""The clip size of the refittable engines."""
tensorrt_only, tensorrt_rtx_only = (
    pytest.mark.parametrize("release", releases, scope="module", indirect=True) for releases in (TENSORRT, ["rtx-1.7"])
)


@pytest.fixture(scope="module", autouse=True)
def _cache_of_the_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("user-cache")))
        yield


@pytest.fixture(scope="module", params=RELEASES)
def release(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def built(release: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with engines, which are only read."""
    bundle = small_copy(tmp_path_factory.mktemp("built"))
    Workshop(release).build(bundle)
    return bundle


@pytest.fixture(scope="module")
def refittable(release: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = small_copy(tmp_path_factory.mktemp("refittable"))
    Workshop(release).build(bundle, REFITTED, refit=True)
    return bundle


@pytest.fixture
def process(release: str, built: Path) -> Process:
    return Process(release, built)


@pytest.fixture
def opened(process: Process) -> Opened:
    return process.open()


@pytest.fixture
def spoilt(release: str, built: Path, tmp_path: Path) -> Process:
    """A process whose bundle and engines a test may change."""
    copied = shutil.copytree(built, tmp_path / "bundle", ignore=shutil.ignore_patterns("*.kernels"))
    return Process(release, Path(copied))


# One engine


def test_an_engine_tells_its_types_and_its_memory(process: Process) -> None:
    encoder = process.open("text_encoder").engine
    ids = dict.fromkeys(("input_ids", "attention_mask", "clip_skip"), "int64")
    assert encoder.dtypes == {**ids, "prompt_embeds": "float16"}
    assert process.open().engine.dtypes == {"latents": "float32", "frames": "uint8"}
    assert encoder.activation_bytes == ACTIVATION_BYTES


def test_the_plan_is_what_was_built(process: Process) -> None:
    process.open()
    assert len(process.workshop.calls("Runtime")) == 1
    process.open("unet")
    assert len(process.workshop.calls("Runtime")) == 1, "one runtime serves all engines"
    assert len(process.workshop.calls("Runtime.deserialize_cuda_engine")) == 2


def test_activation_memory_is_the_callers(opened: Opened) -> None:
    trt, workshop = opened.workshop.trt, opened.workshop
    strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
    (given,) = workshop.calls("ICudaEngine.create_execution_context")
    if workshop.backend == "tensorrt":
        assert given == (strategy,)
    else:
        assert isinstance(given[0], trt.IRuntimeConfig)
        assert workshop.calls("IRuntimeConfig.set_execution_context_allocation_strategy") == [(strategy,)]
    opened.engine.use_activation(8192, 2 * ACTIVATION_BYTES)
    given = workshop.calls("IExecutionContext.set_device_memory")
    assert given == [(4096, ACTIVATION_BYTES), (8192, 2 * ACTIVATION_BYTES)]
    assert len(workshop.calls("ICudaEngine.create_execution_context")) == 1, "other memory takes no other context"


def test_a_run_goes_to_the_stream(opened: Opened) -> None:
    opened.engine.enqueue({"latents": 256, "frames": 512})
    assert opened.workshop.calls("IExecutionContext.execute_async_v3") == [(opened.cuda.stream,)]
    assert opened.cudart.streams == {opened.cuda.stream}


def test_only_addresses_that_changed_are_set(opened: Opened) -> None:
    for addresses in (
        {"latents": 256, "frames": 512},
        {"latents": 256, "frames": 512},
        {"latents": 256, "frames": 768},
    ):
        opened.engine.enqueue(addresses)
    expected = [("latents", 256), ("frames", 512), ("frames", 768)]
    assert opened.workshop.calls("IExecutionContext.set_tensor_address") == expected
    assert len(opened.workshop.calls("IExecutionContext.execute_async_v3")) == 3


def test_a_refused_address_is_an_error_and_is_set_again(opened: Opened) -> None:
    workshop = opened.workshop
    workshop.fail("IExecutionContext.set_tensor_address", "the address\nis not aligned", False)
    with pytest.raises(BackendError, match="address of latents") as error:
        opened.engine.enqueue({"latents": 257})
    one_line(error, workshop.backend, "the address is not aligned")
    assert workshop.calls("IExecutionContext.execute_async_v3") == []
    workshop.trt.answers["IExecutionContext.set_tensor_address"] = lambda *_: True
    opened.engine.enqueue({"latents": 257})
    assert workshop.calls("IExecutionContext.set_tensor_address") == [("latents", 257)] * 2


def test_a_run_that_fails_is_an_error(opened: Opened) -> None:
    opened.workshop.fail("IExecutionContext.execute_async_v3", "Error Code 1:\nCuda Runtime", False)
    with pytest.raises(BackendError) as error:
        opened.engine.enqueue({"latents": 256})
    one_line(error, opened.workshop.backend, "Error Code 1: Cuda Runtime")


def test_memory_that_an_earlier_call_did_without_is_not_blamed(opened: Opened) -> None:
    """A larger memory helps against one of these failures only: the loop frees everything for the other."""
    opened.workshop.complain("Error Code 2: out of memory")  # of a call that succeeded nevertheless
    opened.workshop.fail("IExecutionContext.execute_async_v3", "Error Code 1: Cuda Runtime", False)
    with pytest.raises(BackendError) as error:
        opened.engine.enqueue({"latents": 256})
    assert type(error.value) is BackendError
    one_line(error, opened.workshop.backend, "Error Code 1: Cuda Runtime")


def test_an_engine_tells_whether_it_can_be_captured(opened: Opened) -> None:
    """TensorRT-RTX is asked before a capture, since the call would break the capture. TensorRT has no such call."""
    assert opened.engine.capturable
    asked = opened.workshop.calls("IExecutionContext.is_stream_capturable")
    if opened.workshop.backend == "tensorrt-rtx":
        opened.workshop.trt.answers["IExecutionContext.is_stream_capturable"] = lambda *_: False
        assert not opened.engine.capturable
        assert asked == [(opened.cuda.stream,)]
    else:
        assert asked == []


def test_nothing_is_asked_within_a_capture(opened: Opened) -> None:
    opened.cuda.begin_capture()
    opened.engine.enqueue({"latents": 256})
    assert opened.workshop.calls("IExecutionContext.is_stream_capturable") == []
    assert len(opened.workshop.calls("IExecutionContext.execute_async_v3")) == 1


@pytest.mark.parametrize("name", ["Runtime.deserialize_cuda_engine", "ICudaEngine.create_execution_context"])
def test_an_engine_that_cannot_be_loaded_is_an_error(process: Process, name: str) -> None:
    process.workshop.fail(name, "Error Code 2:\nout of memory")
    with pytest.raises(BackendError) as error:
        process.open()
    one_line(error, process.workshop.backend, f"{GRAPH}.engine", "Error Code 2: out of memory")
    assert isinstance(error.value, DeviceOutOfMemory)


def test_a_context_is_freed_before_its_engine(process: Process) -> None:
    freed: list[str] = []
    answers, trt = process.workshop.trt.answers, process.workshop.trt
    load = answers["Runtime.deserialize_cuda_engine"]

    def watched(name: str, made: Any) -> Any:
        weakref.finalize(made, freed.append, name)
        return made

    answers["Runtime.deserialize_cuda_engine"] = lambda *args: watched("engine", load(*args))
    answers["ICudaEngine.create_execution_context"] = lambda *_: watched("context", trt.new("IExecutionContext"))
    opened = process.open()
    assert freed == []
    opened.engine.close()
    gc.collect()
    assert freed == ["context", "engine"]


# Kernels that TensorRT-RTX compiles


@tensorrt_rtx_only
def test_compiled_kernels_are_kept_for_the_next_process(spoilt: Process) -> None:
    engine, kernels = spoilt.open().engine, spoilt.folder / f"{GRAPH}.kernels"
    assert not kernels.exists()
    for _ in range(2):
        engine.enqueue({"latents": 256})
    assert kernels.read_bytes() == b"kernels"
    assert len(spoilt.workshop.calls("IRuntimeCache.serialize")) == 1
    assert spoilt.workshop.calls("IRuntimeCache.deserialize") == []
    assert not list(spoilt.folder.glob("*.part"))
    later = Process(spoilt.release, spoilt.bundle)
    later.open().engine.enqueue({"latents": 256})
    assert later.workshop.calls("IRuntimeCache.deserialize") == [(b"kernels",)]
    assert later.workshop.calls("IRuntimeCache.serialize") == []


@tensorrt_rtx_only
def test_the_cache_belongs_to_the_context(spoilt: Process) -> None:
    spoilt.open()
    names = [name for name, _, _ in spoilt.workshop.trt.calls]
    assert names.index("IRuntimeConfig.set_runtime_cache") < names.index("ICudaEngine.create_execution_context")


@tensorrt_rtx_only
def test_kernels_of_another_device_are_compiled_anew(spoilt: Process) -> None:
    """A cache is refused if the device or the driver has changed."""
    kernels = spoilt.folder / f"{GRAPH}.kernels"
    kernels.write_bytes(b"of another device")
    spoilt.workshop.fail("IRuntimeCache.deserialize", "the cache is of another device", False)
    spoilt.open().engine.enqueue({"latents": 256})
    assert kernels.read_bytes() == b"kernels"
    later = Process(spoilt.release, spoilt.bundle)
    later.open().engine.enqueue({"latents": 256})
    assert later.workshop.calls("IRuntimeCache.deserialize") == [(b"kernels",)]
    assert later.workshop.calls("IRuntimeCache.serialize") == []


@tensorrt_rtx_only
def test_kernels_that_cannot_be_read_are_compiled_anew(spoilt: Process) -> None:
    kernels = spoilt.folder / f"{GRAPH}.kernels"
    kernels.mkdir()
    spoilt.open().engine.enqueue({"latents": 256})
    assert spoilt.workshop.calls("IRuntimeCache.deserialize") == []
    assert [path.name for path in spoilt.folder.glob("*.kernels*")] == [kernels.name]


@tensorrt_rtx_only
def test_without_room_for_kernels_it_runs_all_the_same(spoilt: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    engine = spoilt.open().engine
    monkeypatch.setattr(Path, "write_bytes", full)
    for _ in range(2):
        engine.enqueue({"latents": 256})
    assert not list(spoilt.folder.glob("*.kernels*"))


@tensorrt_only
def test_tensorrt_keeps_no_kernels(process: Process) -> None:
    process.open().engine.enqueue({"latents": 256})
    assert not list(process.folder.glob("*.kernels"))


# Refit


@pytest.fixture
def refitting(release: str, refittable: Path) -> Opened:
    return Process(release, refittable, REFITTED).open()


def table_of(opened: Opened) -> WeightTable:
    return opened.loader.weight_table(opened.bundle, GRAPH, REFITTED)


def test_weights_are_set_by_name_in_their_types(refitting: Opened) -> None:
    table, workshop = table_of(refitting), refitting.workshop
    refitting.engine.refit(table.root, lambda name: table.read(refitting.bundle, name))
    assert [name for name, _ in workshop.calls("Refitter.set_named_weights")] == list(table.root)
    types = {"fp16": np.float16, "fp32": np.float32}
    for (values,), (name, record) in zip(workshop.calls("Weights"), table.root.items(), strict=True):
        assert values.dtype == types[record.precision]
        np.testing.assert_array_equal(values, table.read(refitting.bundle, name))
    assert {record.precision for record in table.root.values()} == {"fp16", "fp32"}
    names = [name for name, _, _ in workshop.trt.calls]
    assert names.count("Refitter.refit_cuda_engine") == 1
    assert "Refitter.set_named_weights" not in names[names.index("Refitter.refit_cuda_engine") :]


def test_bfloat16_is_given_by_its_address_and_lives_until_the_refit(refitting: Opened) -> None:
    workshop, trt = refitting.workshop, refitting.workshop.trt
    name = next(iter(table_of(refitting).root))
    bits = np.arange(1, 7, dtype=np.uint16)
    seen: list[bytes] = []

    def refit(_: Any) -> bool:
        gc.collect()
        (kind, address, count), *_rest = workshop.calls("Weights")
        assert (kind, count) == (trt.DataType.BF16, bits.size)
        seen.append(ctypes.string_at(address, 2 * count))
        return True

    trt.answers["Refitter.refit_cuda_engine"] = refit
    refitting.engine.refit([name], lambda _: bits.copy().reshape(2, 3))
    assert seen == [bits.tobytes()]


def test_arrays_live_until_the_engine_is_refitted(refitting: Opened) -> None:
    """TensorRT keeps the addresses of the weights that it gets, and makes no copy."""
    table, trt = table_of(refitting), refitting.workshop.trt
    names, arrays, alive = list(table.root)[:3], [], []

    def read(_: str) -> Any:
        values = np.ones(3, np.uint16)
        arrays.append(weakref.ref(values))
        return values

    def refit(_: Any) -> bool:
        gc.collect()
        alive.extend(array() is not None for array in arrays)
        return True

    trt.answers["Refitter.refit_cuda_engine"] = refit
    refitting.engine.refit(names, read)
    assert alive == [True] * 3
    gc.collect()
    assert [array() for array in arrays] == [None] * 3


def test_weights_that_were_merged_are_given_too(refitting: Opened) -> None:
    table, workshop = table_of(refitting), refitting.workshop
    first, second, third = list(table.root)[:3]
    answers = iter([[second], [third], []])
    workshop.trt.answers["Refitter.get_missing_weights"] = lambda _: next(answers)
    refitting.engine.refit([first], lambda name: table.read(refitting.bundle, name))
    assert [name for name, _ in workshop.calls("Refitter.set_named_weights")] == [first, second, third]
    assert len(workshop.calls("Refitter.refit_cuda_engine")) == 1


def test_a_weight_is_given_once(refitting: Opened) -> None:
    """Also if the refitter keeps asking for it."""
    table, workshop = table_of(refitting), refitting.workshop
    first, second, third = list(table.root)[:3]
    workshop.trt.answers["Refitter.get_missing_weights"] = lambda _: [first, third, second]
    refitting.engine.refit([first, second], lambda name: table.read(refitting.bundle, name))
    assert [name for name, _ in workshop.calls("Refitter.set_named_weights")] == [first, second, third]
    assert len(workshop.calls("Refitter.get_missing_weights")) == 2
    assert len(workshop.calls("Refitter.refit_cuda_engine")) == 1


def test_the_stream_is_waited_for_before_a_refit(refitting: Opened) -> None:
    def refit(_: Any) -> bool:
        assert refitting.cudart.calls[-1] == "cudaStreamSynchronize"
        return True

    refitting.workshop.trt.answers["Refitter.refit_cuda_engine"] = refit
    refitting.engine.refit([next(iter(table_of(refitting).root))], lambda _: np.zeros(1, np.float16))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Refitter.set_named_weights", "refuses the weight"),
        ("Refitter.refit_cuda_engine", "cannot refit"),
    ],
)
def test_a_refit_that_fails_is_an_error(refitting: Opened, name: str, message: str) -> None:
    refitting.workshop.fail(name, "Error Code 3:\nwrong count", False)
    table = table_of(refitting)
    with pytest.raises(BackendError, match=message) as error:
        refitting.engine.refit(table.root, lambda weight: table.read(refitting.bundle, weight))
    one_line(error, "Error Code 3: wrong count")


def test_an_unknown_weight_is_refused(refitting: Opened) -> None:
    with pytest.raises(BackendError, match="no weight 'conv_in.bogus'") as error:
        refitting.engine.refit(["conv_in.bogus"], lambda _: np.zeros(1, np.float16))
    one_line(error)
    assert refitting.workshop.calls("Refitter.refit_cuda_engine") == []


def test_a_missing_weight_that_no_table_has_is_an_error(refitting: Opened) -> None:
    """Constants of the graph have no name in a checkpoint."""
    table, answers = table_of(refitting), refitting.workshop.trt.answers
    answers["Refitter.get_all_weights"] = lambda _: [*table.root, "val_17"]
    answers["Refitter.get_missing_weights"] = lambda _: ["val_17"]
    with pytest.raises(BackendError, match="needs the weight 'val_17', which the bundle does not have") as error:
        refitting.engine.refit(list(table.root)[:1], lambda name: table.read(refitting.bundle, name))
    one_line(error)
    assert refitting.workshop.calls("Refitter.refit_cuda_engine") == []


def test_engines_that_were_not_built_for_it_are_not_refitted(opened: Opened) -> None:
    with pytest.raises(BackendError, match="refit") as error:
        opened.engine.refit(["conv_in.weight"], lambda _: np.zeros(1, np.float16))
    one_line(error)
    assert opened.workshop.calls("Refitter") == []
    assert opened.loader.weight_table(opened.bundle, GRAPH, SIZE).root == {}
    with pytest.raises(BackendError, match="refit"):
        opened.loader.check_refit(opened.bundle)


def test_engines_that_were_built_for_it_can_be_refitted(refitting: Opened) -> None:
    refitting.loader.check_refit(refitting.bundle)


def test_engines_keep_their_own_weights_when_they_are_opened(refitting: Opened) -> None:
    assert refitting.workshop.calls("Refitter") == []


def test_stripped_engines_get_the_weights_of_the_bundle(release: str, tmp_path: Path) -> None:
    bundle = small_copy(tmp_path)
    Workshop(release).build(bundle, strip_weights=True)
    opened = Process(release, bundle).open()
    table = opened.loader.weight_table(opened.bundle, GRAPH, SIZE)
    given = opened.workshop.calls("Refitter.set_named_weights")
    assert [name for name, _ in given] == list(table.root)
    names = [name for name, _, _ in opened.workshop.trt.calls]
    assert names.index("Refitter.refit_cuda_engine") < names.index("ICudaEngine.create_execution_context")
    assert set(table.root) == set(plan_of(Process(release, bundle).folder / f"{GRAPH}.engine")["weights"])
    assert len(opened.workshop.calls("Refitter.refit_cuda_engine")) == 1


def test_stripped_engines_get_no_weights_that_were_changed(release: str, tmp_path: Path) -> None:
    """An export into an open bundle does this."""
    process = Process(release, small_copy(tmp_path))
    process.workshop.build(process.bundle, strip_weights=True)
    bundle, cuda = Bundle.load(process.bundle), Cuda(process.cudart)
    path = process.bundle / bundle.graph(GRAPH).weights[0]
    path.write_bytes(bytes(path.stat().st_size))
    shapes = static_shapes(bundle.manifest, GRAPH, SIZE)
    with pytest.raises(BackendError, match="differs from its checksum since the bundle was loaded; load it") as error:
        process.loader.open(bundle, GRAPH, SIZE, shapes, cuda)
    one_line(error, repr(bundle.graph(GRAPH).weights[0]))
    assert process.workshop.calls("Refitter") == []


def test_a_stripped_engine_without_weights_is_opened_too(release: str, tmp_path: Path) -> None:
    bundle = small_copy(tmp_path)
    Workshop(release).build(bundle, strip_weights=True)
    opened = Process(release, bundle).open("lcm_update")
    assert opened.workshop.calls("Refitter.set_named_weights") == []
    assert opened.loader.weight_table(opened.bundle, "lcm_update", SIZE).root == {}


def test_a_damaged_weight_table_is_refused(release: str, refittable: Path, tmp_path: Path) -> None:
    process = Process(release, Path(shutil.copytree(refittable, tmp_path / "bundle")), REFITTED)
    (process.folder / f"{GRAPH}.weights.json").write_text("{")
    process.refuses("differs from its checksum", "--refit")
    with pytest.raises(BackendError, match=r"weights\.json.*build the engines again") as error:
        process.loader.weight_table(Bundle.load(process.bundle), GRAPH, REFITTED)
    one_line(error)
